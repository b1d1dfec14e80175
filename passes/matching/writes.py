"""In-place writes: a walk along data flow must not pass through memory that something else writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from ..graph.graph_eval import MOVES, linear_parts
from .sites import NoMatch

aten = torch.ops.aten

_HARMLESS = {aten.detach_.default, aten.requires_grad_.default}


class WriteGuard:
    """Knows every value of a graph that is written in place, and whether such a value reaches an attention."""

    def __init__(self, graph: Graph) -> None:
        self._written = _written_values(graph)
        self._clean: set[tuple[Node, bool]] = set()

    def check(self, operands: Sequence[Node], mask: Node | None) -> None:
        """Raises NoMatch when a write reaches `operands` (back to their projections) or the mask (all the way)."""
        if not self._written:
            return
        for operand in operands:
            self._walk(operand, stop_at_linear=True)
        if mask is not None:
            self._walk(mask, stop_at_linear=False)

    def check_aliases(self, values: Sequence[Node]) -> None:
        """Raises NoMatch when one of `values` is written in place, itself or through the memory it is a view of."""
        for val in values:
            node: Node | None = val
            while node is not None:
                if node in self._written:
                    raise _reaches(self._written[node])
                node = _viewed(node)

    def _walk(self, root: Node, stop_at_linear: bool) -> None:
        stack = [root]
        while stack:
            node = stack.pop()
            if (node, stop_at_linear) in self._clean:
                continue
            writer = self._written.get(node)
            if writer is not None:
                raise _reaches(writer)
            self._clean.add((node, stop_at_linear))
            if not (stop_at_linear and linear_parts(node)):
                stack.extend(node.all_input_nodes)


def _reaches(writer: Node) -> NoMatch:
    return NoMatch(f"the in-place write {writer.name} reaches the attention: functionalise the program first", writer)


def _viewed(node: Node) -> Node | None:
    """What `node` may be a view of."""
    is_view = node.op == "call_function" and node.target in MOVES and node.args
    source = node.args[0] if is_view else None
    return source if isinstance(source, Node) else None


def _written_values(graph: Graph) -> dict[Node, Node]:
    """Each written value, and every value it is a view of, with the op that writes."""
    written: dict[Node, Node] = {}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable or node.target in _HARMLESS:
            continue
        for spec, arg in zip(schema.arguments, node.args, strict=False):
            if spec.alias_info is None or not spec.alias_info.is_write or not isinstance(arg, Node):
                continue
            target: Node | None = arg
            while target is not None:
                written[target] = node
                target = _viewed(target)
    return written
