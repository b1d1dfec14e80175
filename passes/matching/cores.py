"""Find attention cores: fused SDPA, the eager matmul-softmax-matmul chain, or attention kept as one anchor op."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.fx import Graph, GraphModule, Node

from ...compat import torch_private
from ..graph.arguments import (
    UnexpectedArgument,
    argument,
    flag_arg,
    int_arg,
    ints_arg,
    node_arg,
    number_arg,
    optional_node,
    optional_number,
)
from ..graph.graph_eval import CASTS, is_tensor, shape, symbols
from .sites import Core, NoMatch

aten = torch.ops.aten

SOFTMAX = {aten.softmax.int, *torch_private.softmax_ops()}
_WHERES = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
SDPA = aten.scaled_dot_product_attention.default
ANCHOR = "mla2dsa.dense_attention.default"
# Fused kernels some captures contain already: an attention we must not overlook, although we do not read it.
OPAQUE = ("flash_attention", "efficient_attention", "flex_attention", "_scaled_dot_product", "cudnn_attention")
_Step = tuple[Node, float, Node | None, bool]  # source, factor, mask, mask_hides


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
        try:
            reader = _reader(node)
            if reader is not None:
                found.append(reader(node))
        except (NoMatch, UnexpectedArgument) as miss:
            found.append((miss.node or node, str(miss)))
    return found


def _reader(node: Node) -> Callable[[Node], Core] | None:
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
    return len(sizes) >= 3 and bool(symbols(sizes[int_arg(softmax, 1, "dim")]))


def _opaque(node: Node) -> Core:
    raise NoMatch(f"attention op {node.target} is not one this pass reads: export with sdpa or eager attention", node)


def _sdpa(node: Node) -> Core:
    if number_arg(node, 4, "dropout_p", default=0.0):
        raise NoMatch("attention dropout is on: export the model in eval mode", node)
    query, key, val = (node_arg(node, place, name) for place, name in enumerate(("query", "key", "value")))
    scale = optional_number(node, 6, "scale")
    return Core(
        kind="sdpa", q=query, k=key, v=val, out=node,
        scale=float(shape(query)[-1]) ** -0.5 if scale is None else scale,
        mask=optional_node(node, 3, "attn_mask"), is_causal=flag_arg(node, 5, "is_causal"),
    )  # fmt: skip


def _anchor(node: Node) -> Core:
    query, key, val = (node_arg(node, place, name) for place, name in enumerate(("query", "key", "value")))
    mask, scale = optional_node(node, 3, "mask"), number_arg(node, 4, "scale")
    return Core("anchor", query, key, val, node, scale, mask, is_causal=mask is None)


def _eager(softmax: Node) -> Core:
    if int_arg(softmax, 1, "dim") not in (-1, len(shape(softmax)) - 1):
        raise NoMatch("softmax is not over the keys", softmax)
    out, val = _weighted_sum(softmax)
    query, key, scale, mask, hides = _scores(node_arg(softmax, 0, "self"))
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
            return user, node_arg(user, 1, "other")
        if user.target is aten.dropout.default and number_arg(user, 1, "p") and flag_arg(user, 2, "train"):
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
    query, transposed = node_arg(node, 0, "self"), node_arg(node, 1, "other")
    if not _swaps_last_two(transposed):
        raise NoMatch("attention scores are not q times k transposed", node)
    return query, node_arg(transposed, 0, "self"), scale, mask, hides


def _score_step(node: Node, mask_free: bool) -> _Step | None:
    """One op between the product and the softmax, or None when it is unknown."""
    if node.target in CASTS or node.target in (aten.clone.default, aten.alias.default):
        return node_arg(node, 0, "self"), 1.0, None, False
    factor = _factor(node)
    if factor is not None:
        return node_arg(node, 0, "self"), factor, None, False
    return _mask_step(node) if mask_free else None


def _factor(node: Node) -> float | None:
    """What an op multiplies the scores with, when that is a plain number."""
    number = argument(node, 1, "other")
    if not isinstance(number, int | float):
        return None
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return float(number)
    return 1.0 / number if number and node.target in (aten.div.Tensor, aten.div.Scalar) else None


def _mask_step(node: Node) -> _Step | None:
    """An op that puts a mask on the scores."""
    if node.target is aten.add.Tensor and not node.kwargs:
        mask = argument(node, 1, "other")
        return (node_arg(node, 0, "self"), 1.0, mask, False) if isinstance(mask, Node) and is_tensor(mask) else None
    if node.target is aten.masked_fill.Scalar and number_arg(node, 2, "value") <= -1e4:
        return node_arg(node, 0, "self"), 1.0, node_arg(node, 1, "mask"), True
    if node.target not in _WHERES:
        return None
    if _is_hiding_constant(argument(node, 2, "other")):
        return node_arg(node, 1, "self"), 1.0, node_arg(node, 0, "condition"), False
    if _is_hiding_constant(argument(node, 1, "self")):
        return node_arg(node, 2, "other"), 1.0, node_arg(node, 0, "condition"), True
    return None


def _is_hiding_constant(node: object) -> bool:
    if not isinstance(node, Node):
        return isinstance(node, int | float) and node <= -1e4
    fills = (aten.full.default, aten.scalar_tensor.default, aten.full_like.default)
    numbers = [a for a in node.args if isinstance(a, int | float) and not isinstance(a, bool)]
    return node.target in fills and bool(numbers) and float(numbers[-1]) <= -1e4


def _swaps_last_two(node: Node) -> bool:
    rank = len(shape(node))
    if node.target is aten.mT.default:
        return True
    if node.target is aten.transpose.int:
        axes = {int_arg(node, 1, "dim0") % rank, int_arg(node, 2, "dim1") % rank}
        return axes == {rank - 1, rank - 2}
    if node.target is aten.permute.default:
        order = [axis % rank for axis in ints_arg(node, 1, "dims")]
        return order == [*range(rank - 2), rank - 1, rank - 2]
    return False


def iter_nodes_of(cores: list[Core | tuple[Node, str]]) -> Iterator[Node]:
    """The node that stands for each core, read or not."""
    for core in cores:
        yield core.out if isinstance(core, Core) else core[0]
