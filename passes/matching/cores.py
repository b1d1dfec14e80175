"""Find attention cores: fused SDPA, the eager matmul-softmax-matmul chain, or attention kept as one anchor op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ...compat import torch_private
from ..graph.graph_eval import CASTS, is_tensor, shape, symbols
from .sites import Core, NoMatch

aten = torch.ops.aten

SOFTMAX = {aten.softmax.int, *torch_private.softmax_ops()}
_WHERES = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
SDPA = aten.scaled_dot_product_attention.default
ANCHOR = "mla2dsa.dense_attention.default"
# Fused kernels some captures contain already: an attention we must not overlook, although we do not read it.
OPAQUE = ("flash_attention", "efficient_attention", "flex_attention", "_scaled_dot_product", "cudnn_attention")
_SDPA_ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def find_cores(graph: Graph) -> list[Core | tuple[Node, str]]:
    """Every attention core in graph order; one that cannot be read is a (node, reason) pair."""
    found: list[Core | tuple[Node, str]] = []
    for node in graph.nodes:
        inner = _nested_graph(node)
        if inner is not None:
            users = ", ".join(sorted({str(user.target) for user in node.users}))
            found += [(node, f"attention stands in a nested graph ({users})") for _ in find_cores(inner)]
        if node.op != "call_function":
            continue
        reader = _reader(node)
        if reader is None:
            continue
        try:
            found.append(reader(node))
        except NoMatch as miss:
            found.append((miss.node or node, str(miss)))
    return found


def _reader(node: Node) -> Any:
    if node.target is SDPA:
        return _sdpa
    name = str(node.target)
    if name == ANCHOR:
        return _anchor
    if node.target in SOFTMAX and _is_over_tokens(node):
        return _eager
    if any(word in name for word in OPAQUE):
        return _opaque
    return None


def _nested_graph(node: Node) -> Graph | None:
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None:
        return None
    inner = getattr(owner, str(node.target), None)
    return inner.graph if isinstance(inner, GraphModule) else None


def _is_over_tokens(softmax: Node) -> bool:
    """Attention normalises over a dynamic token axis; routers normalise over a fixed number of experts.

    In a program of fixed sequence length nothing but the rank tells the two apart.
    """
    sizes = shape(softmax)
    if len(sizes) == 4 and not any(symbols(size) for size in sizes[1:]):
        return True
    return len(sizes) >= 3 and bool(symbols(sizes[int(softmax.args[1])]))  # type: ignore[call-overload]


def _opaque(node: Node) -> Core:
    raise NoMatch(f"attention op {node.target} is not one this pass reads: export with sdpa or eager attention", node)


def _sdpa(node: Node) -> Core:
    args = dict(zip(_SDPA_ARGS, node.args, strict=False)) | dict(node.kwargs)
    if args.get("dropout_p"):
        raise NoMatch("attention dropout is on: export the model in eval mode", node)
    query = args["query"]
    scale = args.get("scale") or float(shape(query)[-1]) ** -0.5
    return Core(
        "sdpa",
        query,
        args["key"],
        args["value"],
        node,
        scale,
        args.get("attn_mask"),
        False,
        bool(args.get("is_causal")),
    )


def _anchor(node: Node) -> Core:
    query, key, val, mask, scale = node.args
    return Core("anchor", query, key, val, node, float(scale), mask, False, mask is None)  # type: ignore[arg-type]


def _eager(softmax: Node) -> Core:
    if int(softmax.args[1]) not in (-1, len(shape(softmax)) - 1):  # type: ignore[call-overload]
        raise NoMatch("softmax is not over the keys", softmax)
    out, val = _weighted_sum(softmax)
    query, key, scale, mask, hides = _scores(softmax.args[0])  # type: ignore[arg-type]
    return Core("eager", query, key, val, out, scale, mask, hides)


def _weighted_sum(softmax: Node) -> tuple[Node, Node]:
    """Forward from the softmax to ``matmul(probabilities, v)``."""
    node = softmax
    while True:
        users = [u for u in node.users if not torch_private.is_metadata_assert(u.target)]
        if len(users) != 1:
            raise NoMatch("the attention probabilities have another reader than the sum over values", softmax)
        user = users[0]
        if user.target is aten.matmul.default and user.args[0] is node:
            return user, user.args[1]  # type: ignore[return-value]
        if user.target is aten.dropout.default and user.args[1] and user.args[2]:
            raise NoMatch("attention dropout is on: export the model in eval mode", user)
        if user.target not in CASTS and user.target not in (
            aten.clone.default,
            aten.dropout.default,
            aten.alias.default,
        ):
            raise NoMatch(f"softmax over tokens is followed by {user.target}, not by a matmul with values", user)
        node = user


def _scores(node: Node) -> tuple[Node, Node, float, Node | None, bool]:
    """Backward from the softmax input to ``matmul(q, k^T)``: (q, k, scale, mask, mask_hides)."""
    scale, mask, hides = 1.0, None, False
    start = node
    while node.target is not aten.matmul.default:
        if node.op != "call_function":
            raise NoMatch("softmax over tokens does not come from a product of queries and keys", start)
        step = _score_step(node, mask is None)
        if step is None:
            raise NoMatch(f"attention scores pass through {node.target}, which this pass does not read", node)
        passed = node
        node, factor, new_mask, new_hides = step
        scale *= factor
        if new_mask is not None:
            if scale != 1.0:
                raise NoMatch("attention scores are scaled after the mask", passed)
            mask, hides = new_mask, new_hides
    query, transposed = node.args
    if not _swaps_last_two(transposed):
        raise NoMatch("attention scores are not q times k transposed", node)
    return query, transposed.args[0], scale, mask, hides  # type: ignore[union-attr, return-value]


def _score_step(node: Node, mask_free: bool) -> tuple[Node, float, Node | None, bool] | None:
    """One op between the product and the softmax: (source, factor, mask, mask_hides), or None when unknown."""
    first, *rest = node.args
    if node.target in CASTS or node.target in (aten.clone.default, aten.alias.default):
        return first, 1.0, None, False  # type: ignore[return-value]
    number = rest[0] if rest and isinstance(rest[0], int | float) else None
    if number is not None and node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return first, float(number), None, False  # type: ignore[return-value]
    if number and node.target in (aten.div.Tensor, aten.div.Scalar):
        return first, 1.0 / number, None, False  # type: ignore[return-value]
    if not mask_free:
        return None
    if node.target is aten.add.Tensor and isinstance(rest[0], Node) and is_tensor(rest[0]) and not node.kwargs:
        return first, 1.0, rest[0], False  # type: ignore[return-value]
    if node.target is aten.masked_fill.Scalar and float(rest[1]) <= -1e4:  # type: ignore[arg-type]
        return first, 1.0, rest[0], True  # type: ignore[return-value]
    if node.target in _WHERES and _is_hiding_constant(rest[1]):
        return rest[0], 1.0, first, False  # type: ignore[return-value]
    if node.target in _WHERES and _is_hiding_constant(rest[0]):
        return rest[1], 1.0, first, True  # type: ignore[return-value]
    return None


def _is_hiding_constant(node: Any) -> bool:
    if not isinstance(node, Node):
        return isinstance(node, int | float) and node <= -1e4
    fills = (aten.full.default, aten.scalar_tensor.default, aten.full_like.default)
    numbers = [a for a in node.args if isinstance(a, int | float) and not isinstance(a, bool)]
    return node.target in fills and bool(numbers) and float(numbers[-1]) <= -1e4


def _swaps_last_two(node: Any) -> bool:
    if not isinstance(node, Node):
        return False
    rank = len(shape(node))
    if node.target is aten.mT.default:
        return True
    if node.target is aten.transpose.int:
        return {int(d) % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[arg-type]
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    return False


def iter_nodes_of(cores: list[Core | tuple[Node, str]]) -> Iterator[Node]:
    """The node that stands for each core, read or not."""
    for core in cores:
        yield core.out if isinstance(core, Core) else core[0]
