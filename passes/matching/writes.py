"""In-place writes: a walk along data flow must not pass through memory that something else writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.fx import Graph, Node

from ...compat.aliasing import Memory, Write, written
from ..graph.graph_eval import linear_parts
from .sites import Core, NoMatch

aten = torch.ops.aten

FUNCTIONALISE = "functionalise the program first"


class WriteGuard:
    """Whether a value of a graph is, wherever it is read, what data flow says it is.

    It is not when its memory is written between: through the value itself, a view of it, what it is a view of, or another
    view of that. The reason then ends in FUNCTIONALISE, unless torch would not see the write when it functionalises.
    """

    def __init__(self, graph: Graph) -> None:
        self._memory = Memory(graph)
        self._clean_to_linears: set[Node] = set()
        self._clean: set[Node] = set()

    def check(self, core: Core) -> None:
        """Raises NoMatch when a write reaches the core itself, its operands (back to their projections) or its mask."""
        operands = {core.q, core.k, core.v}
        self._walk([core.out], set(), stop=lambda node: node in operands or node is core.mask)
        self.check_origin(operands)
        if core.mask is not None:
            self._walk([core.mask], self._clean, stop=lambda node: False)

    def check_origin(self, values: Iterable[Node]) -> None:
        """Raises NoMatch when a write comes between one of `values` and the projections it is computed from."""
        self._walk(values, self._clean_to_linears, stop=lambda node: linear_parts(node) is not None)

    def check_readable(self, values: Iterable[Node], at: Node) -> None:
        """Raises NoMatch when one of `values` would be something else by the time that `at` runs."""
        self._refuse(self._memory.write_between(value, at) for value in values)

    def check_functional(self, node: Node) -> None:
        """Raises NoMatch when `node` itself writes."""
        self._refuse([_as_write(node)])

    def _walk(self, roots: Iterable[Node], clean: set[Node], stop: Callable[[Node], bool]) -> None:
        """Along data flow, to where `stop` holds and what those nodes read. `clean`: where earlier walks found nothing."""
        if not self._memory:
            return
        seen: set[Node] = set()
        found: list[Write | None] = []
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node in seen or node in clean or node.target is aten.sym_size.int:  # a write leaves sizes as they are
                continue
            seen.add(node)
            found += [_as_write(node), *(self._memory.write_between(source, node) for source in node.all_input_nodes)]
            if not stop(node):
                stack.extend(node.all_input_nodes)
        self._refuse(found)
        clean |= seen

    def _refuse(self, writes: Iterable[Write | None]) -> None:
        """Raises NoMatch for the first write; for one that cannot be functionalised, if there is any."""
        found = [write for write in writes if write is not None]
        if found:
            write = next((write for write in found if write.through is not None), found[0])
            advice = FUNCTIONALISE if write.through is None else "write out of place, or into a clone"
            raise NoMatch(f"{write} reaches the attention: {advice}", write.node)


def _as_write(node: Node) -> Write | None:
    targets = written(node)
    return Write(node, None if all(targets.values()) else node) if targets else None
