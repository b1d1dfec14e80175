"""In which dim of a value the attention heads are, or the queries: followed from where they come in, op by op.

    linear [B,T,H*d] -> view [B,T,H,d] -> transpose [B,H,T,d] -> split, slice, rotate, cat ... -> [B,H,T,d']

Every op here gives a part of them what it gives all: a part of its result follows from the same part of what it reads. An op that
is not here stops the walk; nothing is guessed from names.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from ...compat.aliasing import Memory, shared
from ...compat.torch_private import expression, is_metadata_assert
from ...passes.graph.graph_eval import linear_parts, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Follows:
    """How a node is run for a part of an axis. axis: where that is in its value (of every item, if that is a list); packed: with all
    channels of a head next to each other; sliced: what is read whole, of which that part is taken, and in which dim; sized: the place
    in the shape argument that is the length, if one says so."""

    axis: int
    packed: bool = False
    sliced: Mapping[Node, int] = field(default_factory=dict)
    sized: int | None = None


_OPEN = 1009  # what dims of open length are taken for, to compare strides: any prime above the fixed ones' ratios
Known: TypeAlias = Mapping[Node, Follows]
Length: TypeAlias = int | sympy.Expr
Apply: TypeAlias = Callable[
    [Node, Sequence[Any], Mapping[str, Any]], Any
]  # what a node is, of other arguments than its own


def run_part(
    node: Node, how: Follows, part: range, env: Mapping[Node, Any], own: Mapping[Node, Any], apply: Apply
) -> Any:
    """The node's value for a part of the axis. own: values for that part; env: whole ones."""

    def given(arg: Any) -> Any:
        if not isinstance(arg, Node) or arg in own:
            return own[arg] if isinstance(arg, Node) else arg
        return env[arg].narrow(how.sliced[arg], part.start, len(part)) if arg in how.sliced else env[arg]

    args, kwargs = map_aggregate((node.args, dict(node.kwargs)), given)
    if how.sized is not None:
        sizes = list(args[1])  # type: ignore[arg-type]
        args = (args[0], [*sizes[: how.sized], len(part), *sizes[how.sized + 1 :]], *args[2:])
    return apply(node, args, kwargs)


def follows(node: Node, known: Known, length: Length) -> Follows | None:
    """Of a node that reads one of `known` at least; None where this does not know it."""
    rule = _RULES.get(node.target)
    sources = [source for source in node.all_input_nodes if source in known]
    if rule is None or not sources or (node.kwargs and rule not in (_each, _made)):
        return None
    if rule not in _OF_SEVERAL and sources != [node.args[0]]:
        return None  # what it reads besides is not looked at
    if any(known[source].packed for source in sources) and rule is not _reshaped:
        return None
    return rule(node, known, length)


def followed(
    entries: Known, nodes: Sequence[Node], out: Node, length: Length, users: Collection[Node] = ()
) -> dict[Node, Follows] | None:
    """What of `nodes` is run for a part of the axis, in order, from `entries` on; None where something before `out` needs it whole.
    users: who is given parts all the same."""
    places = {node: place for place, node in enumerate(nodes)}
    how: dict[Node, Follows] = {}
    for place, node in enumerate(nodes):
        if node is out or node in users:
            continue
        others = [source for source in node.all_input_nodes if source not in how]
        begins = node in entries and len(others) == len(node.all_input_nodes)
        late = any(places.get(source, -1) >= places[out] for source in others)
        found = entries[node] if begins else None if late else follows(node, how, length)
        if found is not None:
            how[node] = found
        elif len(others) < len(node.all_input_nodes) and place < places[out]:
            return None
    return how


def undisturbed(
    run: Collection[Node], exits: Collection[Node], out: Node, nodes: Sequence[Node], memory: Memory
) -> bool:
    """Whether it is all the same when these nodes run, and whether one after the other or a part at a time. run: nodes that are run at
    the place of `out`, exits: those of them whose values others see. What they read, make or give is never written, but for new
    memory that they fill themselves before `out`, and nobody else sees."""
    before = set(nodes[: nodes.index(out)])
    values = dict.fromkeys(source for node in run for source in (node, *node.all_input_nodes))
    for value_ in values:
        for node in memory.written_with(value_):
            if node not in run or node not in before or node in exits or node.target not in _FILLED:
                return False
    return True


def lies(node: Node) -> list[int]:
    """The dims of a value, as they lie in memory, the outermost first."""
    strides = [_number(stride) for stride in value(node).stride()]
    steps = [int(s if isinstance(s, int) else s.xreplace(dict.fromkeys(s.free_symbols, _OPEN))) for s in strides]
    return sorted(range(len(steps)), key=steps.__getitem__, reverse=True)


def readers(node: Node, how: Collection[Node]) -> list[Node]:
    """Who reads its value, of those that are not run with it."""
    return [user for user in node.users if user not in how and not is_metadata_assert(user.target)]


def fixed_width(nodes: Iterable[Node]) -> int | None:
    """Channels of a token, in the memory that all of these make; None where one has more of open length than tokens. The first dim is
    the batch."""
    made = [
        value(node) for node in nodes
        if isinstance(value(node), Tensor) and (not shared(node) or node.target in _MAY_COPY)
    ]  # fmt: skip
    if any(sum(not isinstance(size, int) for size in tensor.shape[1:]) > 1 for tensor in made):
        return None
    return sum(math.prod(size for size in tensor.shape[1:] if isinstance(size, int)) for tensor in made)


def packed_heads(linear: Node, heads: int) -> Follows | None:
    """Of a linear layer whose channels all its users take apart into heads and what is each one's."""
    parts = linear_parts(linear)
    if parts is None or not linear.users:
        return None
    known = {linear: Follows(value(linear).ndim - 1, packed=True)}
    alike = all(
        user.target in _RESHAPES and _reshaped(user, known, heads) is not None and user.args[0] is linear
        for user in linear.users
    )
    return known[linear] if alike else None


def _reshaped(node: Node, known: Known, length: Length) -> Follows | None:
    source = node.args[0]
    sizes = node.args[1] if len(node.args) > 1 else None
    if not isinstance(source, Node) or source not in known or not isinstance(sizes, list | tuple):
        return None
    before, after = _shape(source), _shape(node)
    axis = known[source].axis
    if known[source].packed:
        axis = len(after) - 2
        each = after[-1] if axis >= 0 else None
        fits = isinstance(each, int) and before[-1] == each * length
    else:
        fits = axis < len(after) and before[:axis] == after[:axis]
    if axis < 0 or not fits or after[axis] != length or len(sizes) != len(after):
        return None
    said = _number(sizes[axis])
    return Follows(axis, sized=axis if said == length else None) if said in (length, -1) else None


def _made(node: Node, known: Known, length: Length) -> Follows | None:
    """Memory that is not filled yet, as long in the dim of the heads as what it is made like."""
    source, sizes = node.args[:2]
    if not isinstance(source, Node) or source not in known or not isinstance(sizes, list | tuple):
        return None
    axis = known[source].axis
    return Follows(axis, sized=axis) if axis < len(sizes) and _number(sizes[axis]) == length else None


def _each(node: Node, known: Known, length: Length) -> Follows | None:
    """Element by element: what it reads is lined up at the last dim."""
    return _lined_up(node, list(node.all_input_nodes), known, length)


def _alike(node: Node, known: Known, length: Length) -> Follows | None:
    """As large as its first argument, of which alone the value counts."""
    return _lined_up(node, [node.args[0]], known, length) if node.args[0] in known else None  # type: ignore[list-item]


def _filled(node: Node, known: Known, length: Length) -> Follows | None:
    """What is written to has to be one of them: nothing else may be changed by some heads."""
    return _each(node, known, length) if node.args[0] in known else None


def _projected(node: Node, known: Known, length: Length) -> Follows | None:
    """A linear layer, or matrices of each head, that take apart neither rows nor heads."""
    source, weight = node.args[:2]
    axis = _axis(node, known)
    if axis is None or axis >= value(source).ndim - 1:  # type: ignore[arg-type]
        return None
    alike = node.target is aten.linear.default or value(weight).ndim <= value(source).ndim  # type: ignore[arg-type]
    rows = axis == value(source).ndim - 2 or node.target is aten.linear.default  # type: ignore[arg-type]
    return Follows(axis) if alike and rows and length_of(node, axis) == length else None


def _joined(node: Node, known: Known, length: Length) -> Follows | None:
    parts, dim = _list(node.args[0]), node.args[1] if len(node.args) > 1 else 0
    found = _lined_up(node, parts, known, length) if parts and all(isinstance(p, Node) for p in parts) else None
    ranks = {value(part).ndim for part in parts} if found else set()
    fits = found and len(ranks) == 1 and all(length_of(part, found.axis) == length for part in parts)
    return found if fits and _other(node, dim, found.axis) else None  # type: ignore[union-attr]


def _scattered(node: Node, known: Known, length: Length) -> Follows | None:
    """A part along another dim put in the place of what was there."""
    parts, dim = list(node.args[:2]), node.args[2] if len(node.args) > 2 else 0
    found = _lined_up(node, parts, known, length)  # type: ignore[arg-type]
    fits = found is not None and value(parts[0]).ndim == value(parts[1]).ndim  # type: ignore[arg-type]
    fits = fits and all(length_of(part, found.axis) == length for part in parts)  # type: ignore[arg-type, union-attr]
    return found if fits and _other(parts[0], dim, found.axis) else None  # type: ignore[union-attr]


def _lined_up(node: Node, sources: list[Node], known: Known, length: Length) -> Follows | None:
    rank, axes, sliced = value(node).ndim, set(), {}
    for source in sources:
        if source in known:
            axes.add(known[source].axis + rank - value(source).ndim)
    if len(axes) != 1 or length_of(node, axis := axes.pop()) != length:
        return None
    for source in sources:
        place = axis - rank + value(source).ndim if isinstance(value(source), Tensor) else -1
        if source in known or place < 0 or length_of(source, place) == 1:
            continue
        if length_of(source, place) != length:
            return None
        sliced[source] = place
    return Follows(axis, sliced=sliced)


def _along(first: int, many: bool = False) -> _Rule:
    """What works along the dims given as argument `first`, and keeps the order of the others."""

    def rule(node: Node, known: Known, length: Length) -> Follows | None:
        axis = _axis(node, known)
        dims = node.args[first] if len(node.args) > first else 0
        dims = dims if many else [dims]
        if axis is None or not isinstance(dims, list | tuple) or not all(_other(node.args[0], d, axis) for d in dims):
            return None
        return Follows(axis)

    return rule


def _averaged(node: Node, known: Known, length: Length) -> Follows | None:
    found = _along(1, many=True)(node, known, length)
    keeps = len(node.args) > 2 and node.args[2] is True and bool(node.args[1])  # none are all of them
    return found if keeps else None


def _turned(node: Node, known: Known, length: Length) -> Follows | None:
    axis, rank = _axis(node, known), value(node).ndim
    if axis is None or not all(isinstance(dim, int) for dim in node.args[1:3]):
        return None
    first, second = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
    return Follows({first: second, second: first}.get(axis, axis))


def _permuted(node: Node, known: Known, length: Length) -> Follows | None:
    axis, order = _axis(node, known), _list(node.args[1])
    return None if axis is None else Follows([dim % len(order) for dim in order].index(axis))


def _widened(node: Node, known: Known, length: Length) -> Follows | None:
    """A new dim, of length 1."""
    axis, dim = _axis(node, known), node.args[1]
    if axis is None or not isinstance(dim, int):
        return None
    return Follows(axis + (dim % value(node).ndim <= axis))


def _last_dims(node: Node, known: Known, length: Length) -> Follows | None:
    """What takes apart or joins the last dims alone."""
    axis = _axis(node, known)
    kept = min(value(node).ndim, value(node.args[0]).ndim) - 1 if axis is not None else 0  # type: ignore[arg-type]
    return Follows(axis) if axis is not None and axis < kept else None


def _flattened(node: Node, known: Known, length: Length) -> Follows | None:
    axis, start = _axis(node, known), node.args[1] if len(node.args) > 1 else 0
    rank = value(node.args[0]).ndim if axis is not None else 1  # type: ignore[arg-type]
    return Follows(axis) if axis is not None and isinstance(start, int) and axis < start % rank else None


def _item(node: Node, known: Known, length: Length) -> Follows | None:
    axis = _axis(node, known)
    return None if axis is None or not isinstance(value(node), Tensor) else Follows(axis)


def _axis(node: Node, known: Known) -> int | None:
    source = node.args[0] if node.args else None
    return known[source].axis if isinstance(source, Node) and source in known else None


def _other(like: Any, dim: Any, axis: int) -> bool:
    return isinstance(dim, int) and isinstance(like, Node) and dim % value(like).ndim != axis


def length_of(node: Node, axis: int) -> Length:
    return _number(value(node).shape[axis])


def _shape(node: Node) -> list[Length]:
    return [_number(size) for size in value(node).shape]


def _number(size: Any) -> Length:
    """A size, or a node that gives one."""
    size = value(size) if isinstance(size, Node) else size
    found: Length = expression(size) if isinstance(size, torch.SymInt) else size
    return found


def _list(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, list | tuple) else []


_Rule: TypeAlias = Callable[[Node, Known, int], Follows | None]
_RESHAPES = (aten.view.default, aten.reshape.default)
_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(
        (
            aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.neg.default, aten.to.dtype,
            aten.to.dtype_layout, aten.to.device, aten.clone.default, aten.contiguous.default,
            aten.alias.default, aten.pow.Tensor_Scalar, aten.rsqrt.default,
        ), _each,
    ),
    aten.type_as.default: _alike,
    aten.linear.default: _projected,
    aten.matmul.default: _projected,
    aten.cat.default: _joined,
    aten.copy_.default: _filled,
    aten.slice_scatter.default: _scattered,
    aten.new_empty.default: _made,
    aten.transpose.int: _turned,
    aten.permute.default: _permuted,
    aten.unsqueeze.default: _widened,
    aten.split_with_sizes.default: _along(2),
    aten.split.Tensor: _along(2),
    aten.chunk.default: _along(2),
    aten.slice.Tensor: _along(1),
    aten.index_select.default: _along(1),
    aten.mean.dim: _averaged,
    aten.view_as_complex.default: _last_dims,
    aten.view_as_real.default: _last_dims,
    aten.flatten.using_ints: _flattened,
    operator.getitem: _item,
}  # fmt: skip
_OF_SEVERAL = (_each, _alike, _filled, _joined, _scattered)
_FILLED = (aten.new_empty.default, aten.slice.Tensor, aten.copy_.default)
_MAY_COPY = (aten.contiguous.default, aten.reshape.default, aten.flatten.using_ints)
