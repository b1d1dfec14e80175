"""Rotary tables of complex numbers (DeepSeek-V2) as pairs of real ones, for ONNX has no complex arithmetic.

polar(r, a)              ->  stack(r cos a, r sin a)          a complex tensor [..] is a real one [.., 2]
view_as_complex(x) * t   ->  (x0 t0 - x1 t1, x0 t1 + x1 t0)
view_as_real(z)          ->  z
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from ...errors import UserError

aten = torch.ops.aten
_MOVES = {aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor}  # by an axis, their second argument


def real_numbers(graph: Graph) -> None:
    """Rewrite every complex node of `graph`, in place. Raises UserError for an op that has no rule here."""
    pairs: dict[Node, Node] = {}
    for node in list(graph.nodes):
        inputs = [it for it in node.all_input_nodes if it in pairs]
        if not inputs and not _is_complex(node):
            continue
        with graph.inserting_before(node):
            pairs[node] = _as_pair(_builder(graph, node), node, pairs)
        if not _is_complex(node):
            node.replace_all_uses_with(pairs.pop(node))
    for node in reversed(list(graph.nodes)):
        if _is_complex(node) or (node.target is aten.view_as_real.default and not node.users):
            graph.erase_node(node)


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


def _builder(graph: Graph, like: Node) -> Callable[..., Node]:
    def build(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        node.meta = {name: value for name, value in like.meta.items() if name != "val"}
        node.meta["val"] = target(*torch.fx.map_arg(args, lambda it: it.meta["val"]))
        return node

    return build


def _as_pair(build: Callable[..., Node], node: Node, pairs: dict[Node, Node]) -> Node:
    target, args = node.target, node.args
    first = args[0] if args else None
    if target is aten.polar.default:
        parts = [build(aten.mul.Tensor, first, build(op, args[1])) for op in (aten.cos.default, aten.sin.default)]
        return build(aten.stack.default, parts, -1)
    if target is aten.view_as_complex.default and isinstance(first, Node):
        return first
    if isinstance(first, Node) and first in pairs:
        if target in (aten.view_as_real.default, aten.to.dtype_layout, aten.to.dtype, aten.clone.default):
            return pairs[first]
        if target in _MOVES:
            axis = int(args[1])  # type: ignore[arg-type]
            return build(target, pairs[first], axis if axis >= 0 else axis - 1, *args[2:])
        other = args[1] if len(args) > 1 else None
        if target is aten.mul.Tensor and (not isinstance(other, Node) or other in pairs):
            return _product(build, pairs[first], pairs[other] if isinstance(other, Node) else other)
    raise UserError(f"{node.name} ({target}) on complex numbers has no form in ONNX")


def _product(build: Callable[..., Node], a: Node, b: Any) -> Node:
    if not isinstance(b, Node):
        return build(aten.mul.Tensor, a, b)
    (a0, a1), (b0, b1) = ([build(aten.select.int, it, -1, part) for part in (0, 1)] for it in (a, b))
    real = build(aten.sub.Tensor, build(aten.mul.Tensor, a0, b0), build(aten.mul.Tensor, a1, b1))
    imaginary = build(aten.add.Tensor, build(aten.mul.Tensor, a0, b1), build(aten.mul.Tensor, a1, b0))
    return build(aten.stack.default, [real, imaginary], -1)
