"""Evaluate pieces of an exported graph on concrete values: how a claim about a graph is proved instead of spelled.

A piece is fed with values for some nodes; symbolic sizes are bound by an environment. Everything runs on the CPU in
float64, whatever device and dtype the graph has: casts between floating types are skipped, so that integer tags survive.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ...compat import torch_private
from .arguments import UnexpectedArgument, node_arg, operation, optional_node

aten = torch.ops.aten

END = 2**31  # from here on a number is no length: the end of a slice, or what hides a key

CASTS = {
    aten.to.dtype,
    torch_private.cast_op(),
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
}
UNINITIALISED = {aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default}
BLANK = UNINITIALISED | {
    aten.zeros.default,
    aten.new_zeros.default,
    aten.zeros_like.default,
}  # fresh memory, to be filled
MOVES = CASTS | BLANK | {
    aten.view.default, aten.reshape.default, torch_private.view_op(), aten.transpose.int, aten.permute.default,
    aten.expand.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.slice.Tensor,
    aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.cat.default, aten.slice_scatter.default,
    aten.copy.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.select.int, aten.flatten.using_ints, aten.unflatten.int, aten.lift_fresh_copy.default, aten.t.default,
    aten.split_with_sizes_copy.default, aten.repeat_interleave.self_int, aten.narrow.default, aten.detach_.default,
    aten.detach.default, aten.select_scatter.default, aten.unbind.int, aten.stack.default,
    aten.expand_copy.default, aten.expand_as.default, aten.view_as.default, aten.repeat.default, aten.mT.default,
    aten.movedim.int, aten.swapaxes.default, operator.getitem,
}  # fmt: skip


class CannotEvaluate(Exception):
    """A piece of the graph needs a value that was not fed."""


def value(node: Node) -> Any:
    """The fake value recorded for a node: a FakeTensor, a SymInt, a tuple of those, or None."""
    return node.meta.get("val")


def shape(node: Node) -> tuple[Any, ...]:
    return tuple(value(node).shape)


def is_tensor(node: Node) -> bool:
    return isinstance(value(node), Tensor)


def carries_tensors(node: Node) -> bool:
    return isinstance(value(node), Tensor | tuple | list)


def symbols(size: Any) -> set[sympy.Symbol]:
    """Free symbols of one size (empty for a plain int)."""
    return set(torch_private.expression(size).free_symbols) if isinstance(size, torch.SymInt) else set()


def node_symbols(nodes: Iterable[Node]) -> list[sympy.Symbol]:
    """Every symbol in the shapes and sizes of `nodes`, in a stable order."""
    found: set[sympy.Symbol] = set()
    for node in nodes:
        val = value(node)
        for size in val.shape if isinstance(val, Tensor) else (val,):
            found |= symbols(size)
    return sorted(found, key=str)


def concrete(size: Any, env: Mapping[sympy.Symbol, int]) -> int:
    """A size with its symbols replaced. Raises CannotEvaluate on an unbound symbol."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    missing = symbols(size) - set(env)
    if missing:
        raise CannotEvaluate(f"size {size} has no value here")
    return int(torch_private.expression(size).xreplace({s: sympy.Integer(v) for s, v in env.items()}))


def concrete_shape(node: Node, env: Mapping[sympy.Symbol, int]) -> list[int]:
    return [concrete(size, env) for size in shape(node)]


def evaluate(
    roots: Iterable[Node], feed: Mapping[Node, Any], env: Mapping[sympy.Symbol, int], dtype: torch.dtype = torch.float64
) -> list[Any]:
    """Values of `roots`, given `feed` for some nodes and `env` for the symbols.

    Raises CannotEvaluate when an unfed placeholder, parameter or opaque op is reached.
    """
    memo: dict[Node, Any] = dict(feed)
    roots = list(roots)
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node in memo:
            stack.pop()
            continue
        waiting = [] if _is_leaf_value(node) else [n for n in node.all_input_nodes if n not in memo]
        if waiting:
            stack.extend(waiting)
            continue
        memo[node] = _run(node, memo, env, dtype)
        stack.pop()
    return [memo[root] for root in roots]


def _is_leaf_value(node: Node) -> bool:
    """Sizes come from the environment and uninitialised memory from its shape: their inputs are not needed."""
    return isinstance(value(node), torch.SymInt | int) or node.target in UNINITIALISED


def _run(node: Node, memo: Mapping[Node, Any], env: Mapping[sympy.Symbol, int], dtype: torch.dtype) -> Any:
    val = value(node)
    if isinstance(val, torch.SymInt | int) and not isinstance(val, bool):
        return concrete(val, env)
    if node.op != "call_function":
        raise CannotEvaluate(f"{node.name} has no value here")
    if node.target in UNINITIALISED:
        return torch.full(concrete_shape(node, env), float("nan"), dtype=dtype)
    args, kwargs = _resolve((node.args, dict(node.kwargs)), memo)
    if node.target in CASTS and isinstance(args[0], Tensor) and isinstance(val, Tensor):
        return _cast(args[0], val.dtype)
    kwargs.pop("pin_memory", None)
    try:
        return operation(node)(*args, **kwargs)
    except Exception as error:  # whatever an op says to sizes it does not take
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CannotEvaluate(f"{node.name} cannot be run on its own: {line}") from error


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point and (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    if dtype.is_complex:
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64 if dtype.is_floating_point else dtype)


def _resolve(arg: Any, memo: Mapping[Node, Any]) -> Any:
    if isinstance(arg, Node):
        return memo[arg]
    if isinstance(arg, torch.device):
        return torch.device("cpu")
    if isinstance(arg, tuple | list):
        return type(arg)(_resolve(item, memo) for item in arg)
    if isinstance(arg, dict):
        return {key: _resolve(item, memo) for key, item in arg.items()}
    return arg


def integers(arg: Any) -> list[int]:
    """Every integer in an argument: plain, in lists, and inside the formulae of sizes."""
    if isinstance(arg, Node):
        arg = value(arg)
    if isinstance(arg, torch.SymInt):
        return [int(n) for n in torch_private.expression(arg).atoms(sympy.Integer)]
    if isinstance(arg, tuple | list):
        return [number for item in arg for number in integers(item)]
    return [arg] if isinstance(arg, int) and not isinstance(arg, bool) else []


def ancestors(root: Node, stop: Callable[[Node], bool] = lambda node: False) -> dict[Node, None]:
    """`root` and everything it is computed from, not looking behind nodes for which `stop` holds; insertion ordered."""
    seen: dict[Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen[node] = None
        if not stop(node):
            stack.extend(node.all_input_nodes)
    return seen


def is_move(node: Node) -> bool:
    """True for ops that only move data: views, slices, concatenation, copies, casts that keep the dtype."""
    if node.op != "call_function" or node.target not in MOVES:
        return False
    if node.target in CASTS:
        source = node.args[0]
        return isinstance(source, Node) and is_tensor(source) and value(source).dtype == value(node).dtype
    return True


def linear_parts(node: Node) -> tuple[Node, Node, Node | None] | None:
    """(input, weight, bias) when the node is a linear layer, else None."""
    if node.op != "call_function" or node.target is not aten.linear.default:
        return None
    return node_arg(node, 0, "input"), node_arg(node, 1, "weight"), optional_node(node, 2, "bias")


def linear_input(node: Node) -> Node:
    """What a linear layer reads. Raises UnexpectedArgument when the node is none."""
    parts = linear_parts(node)
    if parts is None:
        raise UnexpectedArgument(node, "target", node.target, "a linear layer")
    return parts[0]


def nearest_linears(root: Node) -> list[Node]:
    """The linear layers whose outputs reach `root` without another linear layer between."""
    return [n for n in ancestors(root, stop=lambda n: linear_parts(n) is not None) if linear_parts(n) is not None]
