"""What streaming a program takes, counted from its graph: bytes in memory at the worst moment, and floating-point operations.

Nothing is run. Sizes are read off the fake values with the sequence length put in, values die where `PieceRunner` lets them
die, and an op that only looks at memory in another way (a view) is the memory it looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ..compat.aliasing import shared
from ..compat.torch_private import expression, op_name
from ..kernels.anchors import HEADS, QUERY_ROWS
from ..kernels.cpu import BUDGET_MB
from ..kernels.delta_attention import CHUNK
from ..passes.graph.graph_eval import linear_parts, symbols, value
from ..passes.graph.pieces import Piece
from .execute import PieceRunner
from .one_expert import together
from .tiled import Part, last_uses, queries
from .tiled.expanded import Either
from .tiled.heads import HeadsApart, heads_at_once

aten = torch.ops.aten
_BUDGET = BUDGET_MB * 2**20  # of our own ops, beyond what they are given and return
_Size: TypeAlias = int | sympy.Expr
_Memory: TypeAlias = tuple[tuple[int, int], ...]  # tensors: the number of each one's shape, and bytes of an element
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
    """Of every piece, for one sequence of any length: what does not depend on the length is looked at once, and so are pieces
    that take the same (layers of one kind).

    watch, late: as for `PieceRunner.run`. head: bytes of the weights that are loaded late.
    """

    def __init__(self, runner: PieceRunner, watch: Iterable[str] = (), late: bool = False) -> None:
        head = runner.head if late else set()
        how = _How(set(watch), runner.one_by_one, runner.projection if late else None, head, runner.parts)
        self._shapes = _Shapes(runner)
        self.head: int = sum(math.prod(value(node).shape) * value(node).element_size() for node in head)
        kinds: dict[_Lives, int] = {}
        self._kind_of = [kinds.setdefault(_lives(piece, how, self._shapes), len(kinds)) for piece in runner.pieces]
        self._kinds = list(kinds)

    def at(self, tokens: int) -> list[Footprint]:
        sizes = _Sizes(self._shapes, tokens)
        found = [_footprint(lives, sizes) for lives in self._kinds]
        return [found[kind] for kind in self._kind_of]


class _Shapes:
    """Shapes as formulae, each with a number. The batch is the first dim of an input, and 1; what else is open is the length."""

    def __init__(self, runner: PieceRunner) -> None:
        nodes = [node for piece in runner.pieces for node in piece.nodes]
        inputs = {source for node in nodes for source in node.all_input_nodes if source.op == "placeholder"}
        weights = {node for piece in runner.pieces for node in piece.weights}
        self._batches = {s for node in inputs - weights for s in _symbols(value(node), first=True)}
        self.formulae: list[tuple[_Size, ...]] = []
        self._numbers: dict[tuple[_Size, ...], int] = {}
        self._known: dict[int, int] = {}  # by the identity of a tensor, which its node keeps

    def of(self, tensor: Tensor) -> int:
        if id(tensor) not in self._known:
            self._known[id(tensor)] = self._number(tensor)
        return self._known[id(tensor)]

    def _number(self, tensor: Tensor) -> int:
        return self._numbered(tuple(expression(n) if isinstance(n, torch.SymInt) else n for n in tensor.shape))

    def _numbered(self, formula: tuple[_Size, ...]) -> int:
        number = self._numbers.setdefault(formula, len(self.formulae))
        if number == len(self.formulae):
            self.formulae.append(formula)
        return number

    def of_numbers(self, *numbers: int) -> int:
        """Of no tensor: what else a formula needs."""
        return self._numbered(numbers)

    def memory(self, nodes: Iterable[Node]) -> _Memory:
        """Of all tensors that the values of `nodes` are."""
        values = [value(node) for node in nodes]
        parts = [part for found in values for part in (found if isinstance(found, tuple | list) else (found,))]
        return tuple(sorted((self.of(part), part.element_size()) for part in parts if isinstance(part, Tensor)))

    def put_in(self, formula: sympy.Expr, tokens: int) -> int:
        env = {s: sympy.Integer(1 if s in self._batches else tokens) for s in formula.free_symbols}
        return int(formula.xreplace(env))


class _Sizes:
    """Shapes, by their numbers, and bytes for one sequence."""

    def __init__(self, shapes: _Shapes, tokens: int) -> None:
        self.shapes = [
            [size if isinstance(size, int) else shapes.put_in(size, tokens) for size in formula]
            for formula in shapes.formulae
        ]
        self.tokens = tokens
        self._elements = [math.prod(shape) for shape in self.shapes]

    def nbytes(self, memory: _Memory) -> int:
        return sum(self._elements[shape] * each for shape, each in memory)

    def count(self, cost: _Cost) -> float:
        return cost.formula(*(None if shape is None else self.shapes[shape] for shape in cost.shapes))


def _symbols(found: Any, first: bool = False) -> set[sympy.Symbol]:
    parts = found if isinstance(found, tuple | list) else (found,)
    dims: list[Any] = [size for t in parts if isinstance(t, Tensor) for size in (t.shape[:1] if first else t.shape)]
    dims += [size for size in parts if isinstance(size, torch.SymInt) and not first]
    return set().union(*map(symbols, dims))


@dataclass(frozen=True)
class _Cost:
    """What follows from the shapes of some tensors; None for an argument that is no tensor."""

    formula: Callable[..., float]
    shapes: tuple[int | None, ...]


@dataclass(frozen=True)
class _Step:
    """A node that runs. Values go by their place in the piece. root: whose memory its value is (None: a weight's or an input's);
    makes: what is added to it; dead: roots of views that end with it, and their memory; waits: for other sequences to get there."""

    root: int | None
    makes: _Memory
    workspace: _Cost | None
    flops: _Cost | None
    dead: tuple[tuple[int, _Memory], ...]
    waits: bool = False


@dataclass(frozen=True)
class _Lives:
    """A piece, and how long its values are alive. given: what it is handed by the piece before; experts: bytes that those take
    which are loaded one by one."""

    given: tuple[_Memory, ...]
    steps: tuple[_Step, ...]
    weights: _Memory
    experts: int
    carried: _Memory
    watched: _Memory


@dataclass(frozen=True)
class _How:
    """How pieces are run. watch: names of nodes that somebody is shown; one_by_one: weights of which a part is in memory at a time, and
    its bytes; late: the node whose value is not computed; head: weights that wait with it; parts: of a piece, run a part at a time."""

    watch: set[str]
    one_by_one: Mapping[Node, int]
    late: Node | None
    head: Set[Node]
    parts: Callable[[Piece, Set[str]], Sequence[Part]]


def _lives(piece: Piece, how: _How, shapes: _Shapes) -> _Lives:
    # an attention that may be run in either form takes no more than it does as it stands
    parts = {part.out: part for part in how.parts(piece, how.watch) if not isinstance(part, Either)}
    out_of = {node: part.out for part in parts.values() for node in part.inside}
    exits = {node for part in parts.values() for node in part.exits}
    last_use = last_uses(piece.nodes, piece.last_use, parts.values())
    own = set(piece.nodes)
    given = {s: None for node in piece.nodes for s in node.all_input_nodes if s not in own and s.op != "placeholder"}
    roots = {**_roots([*given, *piece.nodes], exits), **dict.fromkeys(out_of.keys() - exits, None)}
    places = {node: place for place, node in enumerate([*given, *piece.nodes])}
    watched = {node: None for node in piece.nodes if node.name in how.watch and node not in piece.again}

    def memory(node: Node) -> _Memory:
        return () if node is how.late else shapes.memory([node])

    def step(node: Node) -> _Step:
        root, inside = roots[node], node in out_of and node not in exits
        gone = [roots.get(done) for done in last_use[node] if done not in watched]
        return _Step(
            None if root is None else places[root],
            memory(node) if root is node else (),
            _tiled(parts[node], shapes) if node in parts else None if inside else _workspace(node, shapes),
            _flops(node, shapes),
            tuple(sorted((places[done], memory(done)) for done in gone if done is not None)),
            _waits(node, how.one_by_one),
        )

    whole = [node for node in piece.weights if node not in how.one_by_one and node not in how.head]
    # what is read, the numbers it stands for, and the tensor that these are put into
    experts = 3 * max((how.one_by_one.get(node, 0) for node in piece.weights), default=0)
    return _Lives(
        tuple(shapes.memory([node]) for node in given), tuple(map(step, piece.nodes)),
        shapes.memory(whole), experts, shapes.memory(piece.alive), shapes.memory(watched),
    )  # fmt: skip


def _footprint(lives: _Lives, sizes: _Sizes) -> Footprint:
    users = dict.fromkeys(range(len(lives.given)), 1)  # by root: how many of its views are alive
    peak = alive = sum(map(sizes.nbytes, lives.given))
    flops, waiting = 0.0, 0
    for step in lives.steps:
        if step.root is not None:
            alive += sizes.nbytes(step.makes)
            users[step.root] = users.get(step.root, 0) + 1
        peak = max(peak, alive + (int(sizes.count(step.workspace)) if step.workspace else 0))
        flops += sizes.count(step.flops) if step.flops else 0.0
        waiting = max(waiting, alive) if step.waits else waiting
        for root, memory in step.dead:
            users[root] -= 1
            if not users[root]:
                alive -= sizes.nbytes(memory)
    weights, carried, watched = map(sizes.nbytes, (lives.weights, lives.carried, lives.watched))
    if waiting:  # what the others of a group have then, and what was watched of them
        peak += (together(sizes.tokens) - 1) * (waiting + watched)
    return Footprint(weights + lives.experts, peak, carried, watched, flops)


def _waits(node: Node, one_by_one: Mapping[Node, int]) -> bool:
    given = {source for source in node.all_input_nodes for source in (source, *source.all_input_nodes)}
    return node.target is torch.ops.mla2dsa.moe_experts.default and not given.isdisjoint(one_by_one)


def _roots(nodes: Iterable[Node], own: Set[Node]) -> dict[Node, Node | None]:
    """The node whose memory each value is: itself (as are `own`), or what it views; None for a view of a weight or an input."""
    roots: dict[Node, Node | None] = {}
    for node in nodes:
        source = None if node in roots or node in own else _viewed(node)
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


def _tiled(part: Part, shapes: _Shapes) -> _Cost:
    """Bytes of a part, and of what its op needs."""
    if isinstance(part, HeadsApart):
        q, k, v, *_ = _given(part.out, shapes)
        return _Cost(_group, (q, k, v, shapes.of_numbers(part.width)))
    assert isinstance(part, queries.Chain)
    return _Cost(_tile, (shapes.of(value(part.out)), shapes.of_numbers(part.width)))


def _group(q: list[int], k: list[int], v: list[int], width: list[int]) -> int:
    batch, heads, tokens, _ = q
    some = heads_at_once(heads, batch * tokens, *width)
    made = 0 if some == heads else batch * some * tokens * v[-1]  # beside its place in the whole
    own = ([batch, some, *x[2:]] for x in (q, k, v))
    return 4 * (batch * some * tokens * width[0] + made) + _dense(*own)


def _tile(out: list[int], width: list[int]) -> int:
    batch, heads, tokens, _ = out
    return _BUDGET + 4 * batch * heads * min(tokens, queries.tile_rows(batch, heads, *width)) * width[0]


def _workspace(node: Node, shapes: _Shapes) -> _Cost | None:
    """Bytes an op needs beside its arguments and its result."""
    find = _WORKSPACES.get(op_name(node.target))
    return None if find is None else _Cost(find, _given(node, shapes))


def _given(node: Node, shapes: _Shapes) -> tuple[int | None, ...]:
    """Arguments, as the numbers of their shapes."""
    return tuple(
        shapes.of(value(a)) if isinstance(a, Node) and isinstance(value(a), Tensor) else None for a in node.args
    )


def _dense(q: list[int], k: list[int], v: list[int], *_: Any) -> int:
    """Copies of some heads that are filled up with zeros, and a tile's mask: bool, as numbers, and its result."""
    width, heads = max(q[-1], v[-1]), min(q[1], HEADS)
    padded = sum(x[0] * heads * x[2] * width for x in (q, k, v) if x[-1] != width)
    return 4 * (padded + QUERY_ROWS * (2 * k[2] + heads * width))


def _experts(hidden: list[int], index: list[int], weights: list[int], gate_up: list[int], *_: Any) -> int:
    """Rows of the expert that is chosen most: four times its share."""
    rows = min(hidden[0], 4 * math.prod(index) // gate_up[0] + 1)
    return 4 * rows * (2 * hidden[1] + 2 * gate_up[1])


def _delta(q: list[int], k: list[int], v: list[int], *_: Any) -> int:
    """Copies of what it is given, and of the pairs of a chunk: their decays, and two products of them."""
    return 4 * (math.prod(q[:3]) * (5 * q[3] + 3 * v[3]) + 3 * q[0] * q[2] * CHUNK**2 * q[3])


_WORKSPACES: dict[str, Callable[..., int]] = {
    "mla2dsa.dense_attention.default": _dense,
    "mla2dsa.moe_experts.default": _experts,
    "mla2dsa.delta_attention.default": _delta,
    "mla2dsa.attention_mass.default": lambda q, kv, *_: _BUDGET + 4 * math.prod(kv),
    "mla2dsa.lightning_indexer.default": lambda *_: _BUDGET,
    "mla2dsa.sparse_mla.default": lambda *_: _BUDGET,
}


def _flops(node: Node, shapes: _Shapes) -> _Cost | None:
    find = _FLOPS.get(op_name(node.target))
    if find is not None:
        return _Cost(find, _given(node, shapes))
    parts = linear_parts(node)
    if parts is None and node.target not in _MATMULS:
        return None
    last = node.all_input_nodes[0] if parts is None else parts[1]  # the sums are over its last dim
    return _Cost(_product, (shapes.of(value(node)), shapes.of(value(last))))


def _product(result: list[int], last: list[int]) -> float:
    return 2.0 * math.prod(result) * last[-1]


_FLOPS: dict[str, Callable[..., float]] = {
    "mla2dsa.dense_attention.default": lambda q, k, v, *_: 1.0 * math.prod(q[:3]) * k[2] * 2 * max(q[3], v[3]),
    "mla2dsa.moe_experts.default": lambda hidden, index, weights, gate_up, *_: 3.0 * math.prod(index) * hidden[1] * gate_up[1],
    "mla2dsa.delta_attention.default": lambda q, k, v, *_: 2.0 * math.prod(q[:3]) * (2 * CHUNK * (q[3] + v[3]) + 3 * q[3] * v[3]),
    "mla2dsa.attention_mass.default": lambda q, kv, *_: 2.0 * math.prod(q) * kv[1],
    "mla2dsa.lightning_indexer.default": lambda q, k, *_: 1.0 * math.prod(q) * k[1],
    "mla2dsa.sparse_mla.default": lambda q, kv, indices, *_: 2.0 * math.prod(q) * 2 * indices[2],
}  # fmt: skip
