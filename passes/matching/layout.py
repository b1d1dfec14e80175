"""What keys and values are made of, and how they are laid out: proved by running the movement of data on tags.

    hidden --linear kv_a--> [latent | k_pe] --norm--> latent --linear kv_b--> K_nope, V      K = [K_nope | rope(k_pe)]

Behind K and V, through ops that only move data, there must be one linear layer (kv_b) and one more tensor shared by all heads
(k_pe). That movement is run with unique integers in their places, at two shapes: what arrives in K and V *is* the index map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ...compat import torch_private
from ..graph.arguments import int_arg, node_arg
from ..graph.graph_eval import (
    BLANK,
    END,
    CannotEvaluate,
    ancestors,
    concrete_shape,
    evaluate,
    integers,
    is_move,
    is_tensor,
    linear_parts,
    node_symbols,
    shape,
    symbols,
)
from .mask import LONGEST_PROBE
from .sites import Core, NoMatch

aten = torch.ops.aten

# Ops that take a part of one axis, and where they say which axis.
_CUTS: dict[object, int] = {
    aten.slice.Tensor: 1, aten.narrow.default: 1, aten.select.int: 1, aten.slice_scatter.default: 2,
    aten.select_scatter.default: 2, aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2,
}  # fmt: skip
_BROADCASTS = {
    aten.expand.default,
    aten.unsqueeze.default,
    aten.repeat_interleave.self_int,
    aten.clone.default,
    aten.alias.default,
}


@dataclass(frozen=True)
class Behind:
    """kv_b: the up-projection (a linear node) of `latent` with `weight`; k_pe: the rotated key that all heads share."""

    kv_b: Node
    latent: Node
    weight: Node
    k_pe: Node


@dataclass(frozen=True)
class Layout:
    """Row numbers of kv_b per head and channel: uk_rows [H, nope] for K, uv_rows [H, v] for V; where K has its rotary part."""

    uk_rows: Tensor
    uv_rows: Tensor
    rope_dim: int
    rope_first: bool


def _movement(root: Node) -> tuple[dict[Node, None], dict[Node, None]]:
    """(nodes that only move data behind `root`, the tensors they move); uninitialised memory is neither."""
    moving: dict[Node, None] = {}
    leaves: dict[Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node in moving or node in leaves or not (is_tensor(node) or isinstance(node.meta.get("val"), tuple | list)):
            continue
        if not is_move(node):
            leaves[node] = None
            continue
        moving[node] = None
        if node.target not in BLANK:
            stack.extend(node.all_input_nodes)
    return moving, leaves


def behind_keys_and_values(core: Core) -> Behind:
    moving_k, leaves_k = _movement(core.k)
    _, leaves_v = _movement(core.v)
    ups = [(leaf, parts) for leaf in leaves_v if (parts := linear_parts(leaf))]
    if len(leaves_v) != 1 or len(ups) != 1:
        kinds = ", ".join(sorted({str(leaf.target) for leaf in leaves_v}))
        raise NoMatch(f"values are not one projection's output moved around (they come from {kinds})", core.v)
    kv_b, (latent, weight, bias) = ups[0]
    if kv_b not in leaves_k:
        raise NoMatch("keys and values do not share one up-projection: not MLA", core.k)
    if bias is not None:
        raise NoMatch("the latent's up-projection has a bias", kv_b)
    return Behind(kv_b, latent, weight, _shared_key(core.k, kv_b, moving_k))


def _shared_key(key: Node, kv_b: Node, moving: dict[Node, None]) -> Node:
    """The one part of K that does not come from the latent, before it is broadcast over heads."""
    from_latent = {kv_b: True}

    def depends(node: Node) -> bool:
        stack = [node]
        while stack:
            current = stack[-1]
            if current in from_latent:
                stack.pop()
                continue
            inputs = [] if current not in moving or current.target in BLANK else current.all_input_nodes
            todo = [n for n in inputs if n not in from_latent]
            if todo:
                stack.extend(todo)
                continue
            from_latent[current] = any(from_latent[n] for n in inputs)
            stack.pop()
        return from_latent[node]

    depends(key)
    frontier = {
        source: None
        for node in moving
        if from_latent.get(node) and node.target not in BLANK
        for source in node.all_input_nodes
        if is_tensor(source) and not from_latent.get(source) and not _is_blank(source, moving)
    }
    if len(frontier) != 1:
        raise NoMatch(f"keys have {len(frontier)} parts that do not come from the latent, expected one (k_pe)", key)
    k_pe = next(iter(frontier))
    while k_pe in moving and k_pe.target in _BROADCASTS:
        k_pe = node_arg(k_pe, 0, "self")
    return k_pe


def _is_blank(node: Node, moving: dict[Node, None]) -> bool:
    """A view of memory that is only going to be written."""
    while node in moving and node.target not in BLANK and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target in BLANK


class LayoutProver:
    """`prove_layout` for the layers of one graph: those whose movement is node by node the same have the same layout."""

    def __init__(self) -> None:
        self._proved: dict[object, Layout] = {}

    def __call__(self, core: Core, behind: Behind) -> Layout:
        key = _described(core, behind)
        found = self._proved.get(key)
        return self._proved.setdefault(key, prove_layout(core, behind)) if found is None else found


def _described(core: Core, behind: Behind) -> tuple[object, ...]:
    """All that `prove_layout` looks at. What is run, and neither moves data nor is one of the two sources, stands for itself; of what
    lies behind k_pe, which is not run, the sizes are looked at."""
    sources = {behind.kv_b: "kv_b", behind.k_pe: "k_pe"}
    moving = _movement(core.k)[0] | _movement(core.v)[0]
    numbers = {node: number for number, node in enumerate(moving)}
    run = ancestors(core.k, sources.__contains__) | ancestors(core.v, sources.__contains__)

    def said(node: Node) -> object:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            return torch_private.expression(val)
        return numbers.get(node, sources.get(node, node if node in run else _sizes(node)))

    return (
        *((sources.get(node), _sizes(node), node.target, _frozen(node.args, said), _frozen(node.kwargs, said)) for node in moving),
        *((said(node), _sizes(node)) for node in (core.k, core.v, behind.kv_b, behind.k_pe)),
        _sizes(core.q),
    )  # fmt: skip


def _sizes(node: Node) -> tuple[object, ...] | None:
    if not is_tensor(node):
        return None
    return tuple(torch_private.expression(n) if isinstance(n, torch.SymInt) else n for n in shape(node))


def _frozen(arg: object, said: Callable[[Node], object]) -> object:
    """An argument, hashable, with nodes as `said` has them."""
    if isinstance(arg, Node):
        return said(arg)
    if isinstance(arg, tuple | list):
        return tuple(_frozen(item, said) for item in arg)
    if isinstance(arg, dict):
        return tuple((name, _frozen(item, said)) for name, item in arg.items())
    return type(arg), arg


def prove_layout(core: Core, behind: Behind) -> Layout:
    first = _tag_run(core, behind, batch=2, tokens=3)
    cut = _longest_cut(core)
    if cut > LONGEST_PROBE:
        raise NoMatch(f"keys or values are cut at token {cut}: too long to probe", core.k)
    for tokens in (2,) if cut < 2 else (2, cut + 5):
        again = _tag_run(core, behind, batch=1, tokens=tokens)
        same = torch.equal(first.uk_rows, again.uk_rows) and torch.equal(first.uv_rows, again.uv_rows)
        if not same or (first.rope_dim, first.rope_first) != (again.rope_dim, again.rope_first):
            raise NoMatch("how keys and values are laid out depends on the shape", core.k)
    queries = shape(core.q)
    heads, width = first.uk_rows.shape[0], first.uk_rows.shape[1] + first.rope_dim
    if (queries[1], queries[3]) != (heads, width):
        raise NoMatch(f"queries have {queries[1]} heads of {queries[3]}, keys {heads} of {width}", core.q)
    if str(queries[2]) != str(shape(core.k)[2]):
        raise NoMatch(f"{queries[2]} queries but {shape(core.k)[2]} keys: capture without a cache", core.k)
    return first


def _longest_cut(core: Core) -> int:
    """The largest number at which the movement cuts a dynamic axis: what it does to later tokens shows only past it."""
    numbers = [0]
    for node in [*_movement(core.k)[0], *_movement(core.v)[0]]:
        at = _CUTS.get(node.target)
        if at is None:
            continue
        axis = int_arg(node, at, "dim", default=0)
        if symbols(shape(node_arg(node, 0, "self"))[axis]):
            numbers += [abs(n) for n in integers([*node.args[1:at], *node.args[at + 1 :]]) if abs(n) < END]
    return max(numbers)


def _tag_run(core: Core, behind: Behind, batch: int, tokens: int) -> Layout:
    """Run the movement on unique integers: entry [b, h, s, j] of K and V then names what it is."""
    rank = len(shape(behind.kv_b))
    dynamic = [i for i in range(1, rank - 1) if symbols(shape(behind.kv_b)[i])]
    if len(dynamic) != 1:
        raise NoMatch("the latent has no single dynamic token axis: export with a dynamic sequence", behind.kv_b)
    env = dict.fromkeys(node_symbols([*_movement(core.k)[0], *_movement(core.v)[0], behind.kv_b]), tokens)
    env |= dict.fromkeys(symbols(shape(behind.kv_b)[0]), batch)
    try:
        sizes = concrete_shape(behind.kv_b, env)
        batch, tokens, width = sizes[0], sizes[dynamic[0]], sizes[-1]
        rope_sizes = concrete_shape(behind.k_pe, env)
        rope_dim = rope_sizes[-1]
        latent_tags = torch.arange(batch * tokens * width, dtype=torch.float64).view(sizes)
        rope_count = batch * tokens * rope_dim
        if torch.Size(rope_sizes).numel() != rope_count:
            raise NoMatch("k_pe is not one key shared by all heads", behind.k_pe)
        rope_tags = -1.0 - torch.arange(rope_count, dtype=torch.float64).view(rope_sizes)
        feed = {behind.kv_b: latent_tags, behind.k_pe: rope_tags}
        for node in [*_movement(core.k)[0], *_movement(core.v)[0]]:
            if node.target in BLANK:  # zeros, too, are not a tag
                feed[node] = torch.full(concrete_shape(node, env), float("nan"), dtype=torch.float64)
        keys, values = evaluate([core.k, core.v], feed, env)
    except (CannotEvaluate, RuntimeError) as error:
        raise NoMatch(f"keys and values cannot be laid out ({str(error).splitlines()[0]})", core.k) from error
    return _read_tags(core, keys, values, batch, tokens, width, rope_dim)


def _read_tags(core: Core, keys: Tensor, values: Tensor, batch: int, tokens: int, width: int, rope_dim: int) -> Layout:
    if keys.shape[0] != batch or keys.shape[2] != tokens or values.shape[:3] != keys.shape[:3]:
        raise NoMatch("keys are not [batch, heads, tokens, channels], or values have other heads", core.k)
    if bool(keys.isnan().any()) or bool(values.isnan().any()):
        raise NoMatch("memory that was never filled reaches the keys or values", core.k)
    is_rope = keys < 0
    columns = is_rope[0, 0, 0]
    at = columns.nonzero().flatten().tolist()
    if not bool((is_rope == columns).all()) or len(at) != rope_dim:
        raise NoMatch("k_pe does not fill the same channels in every head and token", core.k)
    rope_first = at[0] == 0
    if at != list(range(at[0], at[0] + rope_dim)) or not (rope_first or at[-1] == keys.shape[3] - 1):
        raise NoMatch("k_pe's channels are not at one end of the key", core.k)
    wanted = torch.arange(batch * tokens * rope_dim).view(batch, 1, tokens, rope_dim)
    if not torch.equal(-1 - keys[..., columns].long(), wanted.expand(-1, keys.shape[1], -1, -1)):
        raise NoMatch("k_pe is not the same for every head, or its tokens are moved", core.k)
    return Layout(
        _rows(keys[..., ~columns], batch, tokens, width, core.k, "keys"),
        _rows(values, batch, tokens, width, core.v, "values"),
        rope_dim,
        rope_first,
    )


def _rows(tags: Tensor, batch: int, tokens: int, width: int, node: Node, what: str) -> Tensor:
    """[H, d] rows of kv_b; every token must take its own."""
    start = (torch.arange(batch).view(-1, 1, 1, 1) * tokens + torch.arange(tokens).view(1, 1, -1, 1)) * width
    rows = tags.long() - start
    if bool((rows < 0).any()) or bool((rows >= width).any()) or not bool((rows == rows[:1, :, :1]).all()):
        raise NoMatch(f"{what} mix tokens (a shift or a convolution over time)", node)
    return rows[0, :, 0]
