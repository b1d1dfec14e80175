"""What a streamed program does a part at a time, where its values would be larger than all else: queries, heads."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch.fx import Node

from ...compat.aliasing import Memory
from .axis import Apply
from .expanded import either_in
from .heads import DENSE, heads_apart
from .queries import SPARSE_MLA, chains_in


class Part(Protocol):
    """inside: nodes that are not run by themselves, most of whose values are never whole; out: the node at whose place they are run;
    exits: those of them, and `out`, that have a value afterwards."""

    @property
    def inside(self) -> Sequence[Node]: ...
    @property
    def out(self) -> Node: ...
    @property
    def exits(self) -> Sequence[Node]: ...
    def run(self, env: Mapping[Node, Any], apply: Apply, /) -> dict[Node, Any]: ...


def parts_of(nodes: Sequence[Node], memory: Memory, watched: Collection[str] = ()) -> list[Part]:
    """What of these nodes, in their order, is run a part at a time: one attention, for of two one may read what is inside the other.
    watched: names of nodes whose values are shown."""
    if sum(node.target in (DENSE, SPARSE_MLA) for node in nodes) != 1:
        return []
    return [*chains_in(nodes, memory, watched), *heads_apart(nodes, memory, watched)]


def cached_parts_of(
    nodes: Sequence[Node], memory: Memory, watched: Collection[str], replaced: Container[Any]
) -> list[Part]:
    """What of a program that is run as it is, with caches or without, is run in another form. replaced: ops that are not what they say."""
    return [] if SPARSE_MLA in replaced else [*either_in(nodes, memory, watched)]


def last_uses(
    nodes: Sequence[Node], last_use: Mapping[Node, Sequence[Node]], parts: Iterable[Part]
) -> Mapping[Node, Sequence[Node]]:
    """What ends with each node, where some are run a part at a time: what these read, or make, is not gone before that. last_use: the
    same where none are."""
    order = {node: place for place, node in enumerate(nodes)}
    needed = dict[Node, Node]()  # the last one that it has to be there for
    for out, node in ((part.out, node) for part in parts for node in part.inside):
        for source in (node, *node.all_input_nodes):
            needed[source] = max(out, needed.get(source, out), key=order.__getitem__)
    ends: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node, gone in last_use.items():
        for done in gone:
            ends[max(node, needed.get(done, node), key=order.__getitem__)].append(done)
    return ends
