"""A program in pieces of one layer each: cut between attention cores where the least data is alive.

Nothing here knows layers by name: what is alive there is the residual stream, and what all layers share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ...compat.aliasing import Memory
from ...compat.torch_private import expression, is_metadata_assert
from .graph_eval import linear_parts, value

# What the sizes of the cuts are compared at; any numbers well above the fixed dims' ratio to each other do.
_TYPICAL = 512


@dataclass(frozen=True)
class Piece:
    """Consecutive nodes; `weights` are the placeholders they read, `alive` the values later pieces still need.

    again: those of `nodes` that an earlier piece has run, too: what follows from the inputs alone is computed where it is
    needed, since a mask [B, 1, T, T] of every sequence is more than can be carried.
    """

    nodes: tuple[Node, ...]
    weights: tuple[Node, ...]
    alive: tuple[Node, ...]
    last_use: Mapping[Node, tuple[Node, ...]]
    again: frozenset[Node]


def cut(program: ExportedProgram, cores: set[str], weights: set[Node], memory: Memory) -> list[Piece]:
    """The program in pieces with one of `cores` (names of nodes) each, whole without any. weights: its placeholders that are not inputs."""
    nodes = [
        n for n in program.graph.nodes
        if n.op not in ("placeholder", "output") and not is_metadata_assert(n.target)
    ]  # fmt: skip
    position = {node: i for i, node in enumerate(nodes)}  # not of the output: it is given what was seen on the way
    last = {node: max((position[u] for u in node.users if u in position), default=position[node]) for node in nodes}
    at = [position[node] for node in nodes if node.name in cores]
    free = _free(nodes, weights, memory)
    bounds = [0, *_cheapest_cuts(nodes, last, at, free), len(nodes)]
    return [_piece(nodes, start, end, last, weights, free) for start, end in pairwise(bounds)]


def _free(nodes: list[Node], weights: set[Node], memory: Memory) -> set[Node]:
    """Nodes that follow from the program's inputs alone, whenever they are run."""
    free: set[Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        repeatable = node.op == "call_function" and not _is_random(node.target) and not memory.is_written(node)
        known = all(s in free or (s.op == "placeholder" and s not in weights) for s in sources)
        if repeatable and known and not any(map(memory.is_written, sources)):
            free.add(node)
    return free


def _cheapest_cuts(nodes: list[Node], last: Mapping[Node, int], cores: list[int], free: set[Node]) -> list[int]:
    """Between two cores, and between the last core and the final projection, where the fewest elements are alive."""
    if not cores:
        return []
    change = [0] * (len(nodes) + 2)
    for i, node in enumerate(nodes):
        size = 0 if node in free else _elements(node)
        change[i + 1] += size
        change[last[node] + 1] -= size
    alive, total = [], 0
    for delta in change:
        total += delta
        alive.append(total)
    final = max(i for i, node in enumerate(nodes) if linear_parts(node) or i == cores[-1])
    spans = [*pairwise(cores), (cores[-1], final)]
    return [min(range(end, start, -1), key=lambda i: alive[i]) for start, end in spans if end > start]


def _elements(node: Node) -> int:
    val = value(node)
    parts = val if isinstance(val, tuple | list) else (val,)
    count = 0
    for part in parts:
        if not isinstance(part, Tensor):
            continue
        count += math.prod(_typical(expression(s)) if isinstance(s, torch.SymInt) else s for s in part.shape)
    return count


@cache  # a program has thousands of values, and a few dozen sizes
def _typical(size: sympy.Expr) -> int:
    return int(size.xreplace(dict.fromkeys(size.free_symbols, sympy.Integer(_TYPICAL))))


def _piece(
    nodes: list[Node], start: int, end: int, last: Mapping[Node, int], weights: set[Node], free: set[Node]
) -> Piece:
    own = nodes[start:end]
    inside, again = _completed(own, free)
    read = {source: None for node in inside for source in node.all_input_nodes if source in weights}
    alive = tuple(node for node in nodes[:end] if last[node] >= end and node not in free)
    final: dict[Node, Node] = {}
    for node in inside:
        final |= {source: node for source in (node, *node.all_input_nodes) if source.op != "placeholder"}
    ends: dict[Node, list[Node]] = {node: [] for node in inside}
    for node in final.keys() - set(alive):
        ends[final[node]].append(node)
    return Piece(tuple(inside), tuple(read), alive, {node: tuple(done) for node, done in ends.items()}, again)


def _completed(own: list[Node], free: set[Node]) -> tuple[list[Node], frozenset[Node]]:
    """`own` with the free nodes of earlier pieces that it needs, each right before its first user; and those."""
    inside: dict[Node, None] = {}
    mine = set(own)
    for node in own:
        waiting = [node]
        while waiting:
            missing = [s for s in waiting[-1].all_input_nodes if s in free and s not in mine and s not in inside]
            if missing:
                waiting.extend(missing)
            else:
                inside[waiting.pop()] = None
    return list(inside), frozenset(inside.keys() - mine)


def _is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
