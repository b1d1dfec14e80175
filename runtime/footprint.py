"""What streaming a program takes, counted from its graph: bytes in memory at the worst moment, and floating-point operations.

Nothing is run. Sizes are read off the fake values with the sequence length put in, values die where `PieceRunner` lets them
die, and an op that only looks at memory in another way (a view) is the memory it looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ..compat.aliasing import shared
from ..compat.torch_private import expression
from ..kernels.anchors import QUERY_ROWS
from ..kernels.cpu import BUDGET_MB
from ..passes.graph.graph_eval import concrete, linear_parts, symbols, value
from .execute import Piece, PieceRunner

aten = torch.ops.aten
_BUDGET = BUDGET_MB * 2**20  # of our own ops, beyond what they are given and return
_MATMULS = {aten.matmul.default, aten.mm.default, aten.bmm.default}


@dataclass(frozen=True)
class Footprint:
    """One piece on one sequence. weights: bytes; peak: bytes of all else at the worst moment; carried: bytes that wait for the next
    piece; watched: bytes of the values that were asked for; flops: multiplications and additions."""

    weights: int
    peak: int
    carried: int
    watched: int
    flops: float


def footprints(runner: PieceRunner, tokens: int, watch: Iterable[str] = ()) -> list[Footprint]:
    """Of every piece, for one sequence of `tokens`. watch: as for `PieceRunner.run`."""
    sizes = _Sizes(runner, tokens)
    names = set(watch)
    return [_footprint(piece, sizes, names) for piece in runner.pieces]


class _Sizes:
    """Shapes and bytes for one sequence. The batch is the first dim of an input, and 1; what else is open is the length."""

    def __init__(self, runner: PieceRunner, tokens: int) -> None:
        nodes = [node for piece in runner.pieces for node in piece.nodes]
        inputs = {source for node in nodes for source in node.all_input_nodes if source.op == "placeholder"}
        weights = {node for piece in runner.pieces for node in piece.weights}
        batches = {s for node in inputs - weights for s in _symbols(value(node), first=True)}
        everything = {s for node in [*nodes, *inputs] for s in _symbols(value(node))}
        self._env: Mapping[sympy.Symbol, int] = {s: 1 if s in batches else tokens for s in everything}
        self._known: dict[sympy.Expr, int] = {}

    def shape(self, tensor: Tensor) -> list[int]:
        return [self._size(size) if isinstance(size, torch.SymInt) else size for size in tensor.shape]

    def nbytes(self, found: Any) -> int:
        parts = found if isinstance(found, tuple | list) else (found,)
        return sum(math.prod(self.shape(t)) * t.element_size() for t in parts if isinstance(t, Tensor))

    def _size(self, size: torch.SymInt) -> int:
        key = expression(size)
        if key not in self._known:
            self._known[key] = concrete(size, self._env)
        return self._known[key]


def _symbols(found: Any, first: bool = False) -> set[sympy.Symbol]:
    parts = found if isinstance(found, tuple | list) else (found,)
    dims: list[Any] = [size for t in parts if isinstance(t, Tensor) for size in (t.shape[:1] if first else t.shape)]
    dims += [size for size in parts if isinstance(size, torch.SymInt) and not first]
    return set().union(*map(symbols, dims))


def _footprint(piece: Piece, sizes: _Sizes, watch: set[str]) -> Footprint:
    weights = sum(sizes.nbytes(value(node)) for node in piece.weights)
    own = set(piece.nodes)
    given = {s for node in piece.nodes for s in node.all_input_nodes if s not in own and s.op != "placeholder"}
    roots = _roots([*given, *piece.nodes])
    watched = {node for node in piece.nodes if node.name in watch and node not in piece.again}
    users: dict[Node, int] = {}  # by root: how many of its views are alive
    alive = sum(sizes.nbytes(value(node)) for node in given)
    for node in given:
        users[node] = 1
    peak, flops = alive, 0.0
    for node in piece.nodes:
        root = roots[node]
        if root is not None:
            alive += sizes.nbytes(value(node)) if root is node else 0
            users[root] = users.get(root, 0) + 1
        peak = max(peak, alive + _workspace(node, sizes))
        flops += _flops(node, sizes)
        for done in piece.last_use[node]:
            root = roots.get(done)
            if root is None or done in watched:
                continue
            users[root] -= 1
            if not users[root]:
                alive -= sizes.nbytes(value(root))
    seen = sum(sizes.nbytes(value(node)) for node in watched)
    return Footprint(weights, peak, sum(sizes.nbytes(value(node)) for node in piece.alive), seen, flops)


def _roots(nodes: Iterable[Node]) -> dict[Node, Node | None]:
    """The node whose memory each value is: itself, or what it views; None for a view of a weight or an input."""
    roots: dict[Node, Node | None] = {}
    for node in nodes:
        source = None if node in roots else _viewed(node)
        roots[node] = node if source is None else roots.get(source)
    return roots


def _viewed(node: Node) -> Node | None:
    sources = [s for s in shared(node) if isinstance(value(s), Tensor | tuple | list)]
    if not sources or node.op == "placeholder":
        return None
    first, made = value(sources[0]), value(node)
    if isinstance(first, Tensor) and isinstance(made, Tensor):
        copies = node.target in (aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints)
        if first.dtype != made.dtype or (copies and not first.is_contiguous()):
            return None
    return sources[0]


def _workspace(node: Node, sizes: _Sizes) -> int:
    """Bytes an op needs beside its arguments and its result."""
    find = _WORKSPACES.get(str(node.target))
    return 0 if find is None else find(*_given(node, sizes))


def _given(node: Node, sizes: _Sizes) -> list[Any]:
    """Arguments, tensors as their shapes."""
    return [sizes.shape(value(a)) if isinstance(a, Node) and isinstance(value(a), Tensor) else a for a in node.args]


def _dense(q: list[int], k: list[int], v: list[int], *_: Any) -> int:
    """Copies that are filled up with zeros, and a tile's mask: bool, as numbers, and its result."""
    width = max(q[-1], v[-1])
    padded = sum(math.prod(x[:-1]) * width for x in (q, k, v) if x[-1] != width)
    return 4 * (padded + QUERY_ROWS * (2 * k[2] + q[1] * width))


def _experts(hidden: list[int], index: list[int], weights: list[int], gate_up: list[int], *_: Any) -> int:
    """Rows of the expert that is chosen most: four times its share."""
    rows = min(hidden[0], 4 * math.prod(index) // gate_up[0] + 1)
    return 4 * rows * (2 * hidden[1] + 2 * gate_up[1])


_WORKSPACES: dict[str, Callable[..., int]] = {
    "mla2dsa.dense_attention.default": _dense,
    "mla2dsa.moe_experts.default": _experts,
    "mla2dsa.attention_mass.default": lambda q, kv, *_: _BUDGET + 4 * math.prod(kv),
    "mla2dsa.lightning_indexer.default": lambda *_: _BUDGET,
    "mla2dsa.sparse_mla.default": lambda *_: _BUDGET,
}


def _flops(node: Node, sizes: _Sizes) -> float:
    parts = linear_parts(node)
    if parts is not None:
        return 2.0 * math.prod(sizes.shape(value(node))) * sizes.shape(value(parts[1]))[-1]
    find = _FLOPS.get(str(node.target))
    if find is not None:
        return float(find(*_given(node, sizes)))
    if node.target in _MATMULS:
        first = sizes.shape(value(node.all_input_nodes[0]))
        return 2.0 * math.prod(sizes.shape(value(node))) * first[-1]
    return 0.0


_FLOPS: dict[str, Callable[..., float]] = {
    "mla2dsa.dense_attention.default": lambda q, k, v, *_: 1.0 * math.prod(q[:3]) * k[2] * 2 * max(q[3], v[3]),
    "mla2dsa.moe_experts.default": lambda hidden, index, weights, gate_up, *_: 3.0 * math.prod(index) * hidden[1] * gate_up[1],
    "mla2dsa.attention_mass.default": lambda q, kv, *_: 2.0 * math.prod(q) * kv[1],
    "mla2dsa.lightning_indexer.default": lambda q, k, *_: 1.0 * math.prod(q) * k[1],
    "mla2dsa.sparse_mla.default": lambda q, kv, indices, *_: 2.0 * math.prod(q) * 2 * indices[2],
}  # fmt: skip
