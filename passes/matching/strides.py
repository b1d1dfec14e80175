"""Ops that read how a value lies in memory. A rewritten attention gives the same values, but need not lay them out in the same way."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from ..graph.graph_eval import linear_parts
from .sites import Core, NoMatch

aten = torch.ops.aten

# ATen's ops whose result is a matter of the strides, or of the offset, of what they read.
_NAMES = (
    "as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter", "_reshape_alias", "_reshape_alias_copy", "resize_",
    "resize_as_", "stride", "storage_offset", "sym_stride", "sym_storage_offset", "is_contiguous", "sym_is_contiguous",
)  # fmt: skip
_READ_STRIDES = frozenset(
    getattr(getattr(aten, name), overload)
    for name in _NAMES
    if hasattr(aten, name)
    for overload in getattr(aten, name).overloads()
)


class StrideGuard:
    """Whether something reads the memory layout of what an attention gives, before a linear layer makes a new tensor of it."""

    def __init__(self, graph: Graph) -> None:
        self._reader_of: dict[Node, Node] = {}
        for node in graph.nodes:
            if node.target in _READ_STRIDES:
                self._note(node)

    def check(self, core: Core) -> None:
        """Raises NoMatch when it does."""
        reader = self._reader_of.get(core.out)
        if reader is not None:
            raise NoMatch(
                f"{reader.name} ({reader.target}) reads the memory layout of what the attention gives: index by dimensions",
                reader,
            )

    def _note(self, reader: Node) -> None:
        stack = list(reader.all_input_nodes)
        while stack:
            node = stack.pop()
            if node not in self._reader_of:
                self._reader_of[node] = reader
                stack += [] if linear_parts(node) is not None else node.all_input_nodes
