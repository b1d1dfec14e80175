"""What streaming a program takes, counted from its graph: bytes in memory at the worst moment, and floating-point operations.

Nothing is run. Sizes are read off the fake values with the sequence length put in, values die where `PieceRunner` lets them
die, and an op that only looks at memory in another way (a view) is the memory it looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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
from ..passes.graph.graph_eval import linear_parts, symbols, value
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


class Footprints:
    """Of every piece, for one sequence of any length: what does not depend on the length is looked at once.

    watch: as for `PieceRunner.run`.
    """

    def __init__(self, runner: PieceRunner, watch: Iterable[str] = ()) -> None:
        names = set(watch)
        self._shapes = _Shapes(runner)
        self._lives = [_lives(piece, names) for piece in runner.pieces]

    def at(self, tokens: int) -> list[Footprint]:
        sizes = _Sizes(self._shapes, tokens)
        return [_footprint(lives, sizes) for lives in self._lives]


class _Shapes:
    """Shapes as formulae. The batch is the first dim of an input, and 1; what else is open is the length."""

    def __init__(self, runner: PieceRunner) -> None:
        nodes = [node for piece in runner.pieces for node in piece.nodes]
        inputs = {source for node in nodes for source in node.all_input_nodes if source.op == "placeholder"}
        weights = {node for piece in runner.pieces for node in piece.weights}
        self._batches = {s for node in inputs - weights for s in _symbols(value(node), first=True)}
        self._formulae: dict[int, tuple[Any, ...]] = {}  # by the identity of a tensor, which its node keeps

    def of(self, tensor: Tensor) -> tuple[int | sympy.Expr, ...]:
        if id(tensor) not in self._formulae:
            sizes = (expression(size) if isinstance(size, torch.SymInt) else size for size in tensor.shape)
            self._formulae[id(tensor)] = tuple(sizes)
        return self._formulae[id(tensor)]

    def put_in(self, formula: sympy.Expr, tokens: int) -> int:
        env = {s: sympy.Integer(1 if s in self._batches else tokens) for s in formula.free_symbols}
        return int(formula.xreplace(env))


class _Sizes:
    """Shapes and bytes for one sequence."""

    def __init__(self, shapes: _Shapes, tokens: int) -> None:
        self._shapes, self._tokens = shapes, tokens
        self._known: dict[tuple[int | sympy.Expr, ...], list[int]] = {}

    def shape(self, tensor: Tensor) -> list[int]:
        formulae = self._shapes.of(tensor)
        if formulae not in self._known:
            self._known[formulae] = [
                size if isinstance(size, int) else self._shapes.put_in(size, self._tokens) for size in formulae
            ]
        return self._known[formulae]

    def nbytes(self, found: Any) -> int:
        parts = found if isinstance(found, tuple | list) else (found,)
        return sum(math.prod(self.shape(t)) * t.element_size() for t in parts if isinstance(t, Tensor))


def _symbols(found: Any, first: bool = False) -> set[sympy.Symbol]:
    parts = found if isinstance(found, tuple | list) else (found,)
    dims: list[Any] = [size for t in parts if isinstance(t, Tensor) for size in (t.shape[:1] if first else t.shape)]
    dims += [size for size in parts if isinstance(size, torch.SymInt) and not first]
    return set().union(*map(symbols, dims))


@dataclass(frozen=True)
class _Step:
    """A node that runs. root: whose memory its value is (None: a weight's or an input's); dead: roots of views that end with it."""

    node: Node
    root: Node | None
    dead: tuple[Node, ...]


@dataclass(frozen=True)
class _Lives:
    """A piece, and how long its values are alive. given: what it is handed by the piece before."""

    piece: Piece
    given: tuple[Node, ...]
    steps: tuple[_Step, ...]
    watched: tuple[Node, ...]


def _lives(piece: Piece, watch: set[str]) -> _Lives:
    own = set(piece.nodes)
    given = {s: None for node in piece.nodes for s in node.all_input_nodes if s not in own and s.op != "placeholder"}
    roots = _roots([*given, *piece.nodes])
    watched = {node: None for node in piece.nodes if node.name in watch and node not in piece.again}

    def dead(node: Node) -> tuple[Node, ...]:
        ended = (roots.get(done) for done in piece.last_use[node] if done not in watched)
        return tuple(root for root in ended if root is not None)

    return _Lives(piece, tuple(given), tuple(_Step(n, roots[n], dead(n)) for n in piece.nodes), tuple(watched))


def _footprint(lives: _Lives, sizes: _Sizes) -> Footprint:
    users: dict[Node, int] = dict.fromkeys(lives.given, 1)  # by root: how many of its views are alive
    alive = sum(sizes.nbytes(value(node)) for node in lives.given)
    peak, flops = alive, 0.0
    for step in lives.steps:
        if step.root is not None:
            alive += sizes.nbytes(value(step.node)) if step.root is step.node else 0
            users[step.root] = users.get(step.root, 0) + 1
        peak = max(peak, alive + _workspace(step.node, sizes))
        flops += _flops(step.node, sizes)
        for root in step.dead:
            users[root] -= 1
            if not users[root]:
                alive -= sizes.nbytes(value(root))
    weights, carried, seen = (
        sum(sizes.nbytes(value(node)) for node in nodes)
        for nodes in (lives.piece.weights, lives.piece.alive, lives.watched)
    )
    return Footprint(weights, peak, carried, seen, flops)


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
