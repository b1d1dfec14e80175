"""What we use of torch without its promise. Each function raises `MovedError` when this torch does not have the name any more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from .private_names import Library

TORCH = Library(
    "torch",
    ">=2.11,<2.14",
    names={
        "torch:_check_value": "relates dynamic sizes, and raises ValueError",
        "torch:ops.aten._assert_tensor_metadata.default": "an assert that torch.export adds to a graph",
        "torch:ops.aten._safe_softmax.default": "what a graph's softmax may be",
        "torch:ops.aten._softmax.default": "what a graph's softmax may be",
        "torch:ops.aten._to_copy.default": "what a graph's cast may be",
        "torch:ops.aten._unsafe_view.default": "what a graph's view may be",
        "torch:ops.mkldnn._is_mkldnn_bf16_supported": "whether the CPU multiplies bfloat16",
        "torch:ops.mkldnn._is_mkldnn_fp16_supported": "whether the CPU multiplies float16",
        "torch._dynamo.config:fake_tensor_cache_enabled": "whether shapes are looked up by what was asked before",
        "torch._dynamo.config:patch": "changes it for a while",
        "torch._dynamo.source:ConstantSource": "where a new dynamic size comes from",
        "torch._ops:OpOverload": "an op of a graph",
        "torch._export.serde.schema:ExportedProgram": "a program as a .pt2 describes it",
        "torch._export.serde.serialize:ExportedProgramDeserializer": "makes a program of its description and its tensors",
        "torch._export.serde.serialize:_dict_to_dataclass": "makes a description of the JSON in a .pt2",
        "torch._export.serde.serialize:deserialize_scalar_type": "the element types of a .pt2, by number",
        "torch._subclasses:FakeTensor": "shapes without memory",
        "torch._subclasses:FakeTensorMode": "shapes without memory",
        "torch.export.exported_program:_create_graph_module_for_export": "what a program generates Python code for",
        "torch.fx._lazy_graph_module:_LazyGraphModule": "a module whose code is generated when it is called",
        "torch.fx.experimental.symbolic_shapes:DimDynamic": "the kind of a new dynamic size",
        "torch.fx.experimental.symbolic_shapes:ShapeEnv": "where dynamic sizes are made",
        "torch.fx.experimental.symbolic_shapes:ShapeEnv.create_symbol": "a new dynamic size",
        "torch.fx.experimental.symbolic_shapes:ShapeEnv.create_symintnode": "a new dynamic size",
        "torch.onnx._internal.exporter:": "the name of the ONNX exporter's log",
        "torch.onnx._internal.exporter._registration:ONNXRegistry.from_torchlib": "the ops that the ONNX exporter knows",
        "torch.onnx._internal.exporter._registration:ONNXRegistry.get_decomps": "the ops that the ONNX exporter knows",
        "torch.utils._python_dispatch:TorchDispatchMode": "sees every call of an op",
        "torch.utils._pytree:tree_structure": "how inputs and outputs are nested",
        "torch.utils._pytree:tree_unflatten": "how inputs and outputs are nested",
        "torch.utils._sympy.value_ranges:ValueRanges": "the range of a new dynamic size",
    },
    attributes={
        "FakeTensor.fake_mode": "the mode of a program's fake values",
        "FakeTensorMode.shape_env": "where dynamic sizes are made",
        "GraphModule._graph": "a module whose code is not generated",
        "OpOverload._schema": "what an op writes and returns",
        "SymInt.node.expr": "the formula of a size",
        "TreeSpec.num_leaves": "how inputs and outputs are nested",
    },
)


def check_value(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError(message()) unless `condition` holds. Under torch.export, a condition between sizes becomes known."""
    TORCH.find("torch:_check_value")(condition, message)


def expression(size: torch.SymInt) -> sympy.Expr:
    """The formula of a dynamic size."""
    try:
        formula: sympy.Expr = size.node.expr
    except AttributeError as error:
        raise TORCH.moved("SymInt.node.expr") from error
    return formula


def fake_tensors() -> AbstractContextManager[Any]:
    """While it lasts, new tensors have no memory, and may have dynamic sizes."""
    env = TORCH.find("torch.fx.experimental.symbolic_shapes:ShapeEnv")()
    mode: AbstractContextManager[Any] = TORCH.find("torch._subclasses:FakeTensorMode")(
        allow_non_fake_inputs=True, shape_env=env
    )
    return mode


def uncached_shapes() -> AbstractContextManager[Any]:
    """While it lasts, fake tensors do not look their shapes up by what was asked before.

    With dynamic sizes the looking up costs more than the computing (`benchmarks/v3.py plan` times an export among the rest).
    """
    TORCH.find("torch._dynamo.config:fake_tensor_cache_enabled")
    patched: AbstractContextManager[Any] = TORCH.find("torch._dynamo.config:patch")(fake_tensor_cache_enabled=False)
    return patched


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The mode that the first fake tensor among `values` belongs to: within it, new tensors go with that one.

    Raises ValueError when there is none.
    """
    fake = TORCH.find("torch._subclasses:FakeTensor")
    first = next((value for value in values if isinstance(value, fake)), None)
    if first is None:
        raise ValueError("no value of this program is a fake tensor: it was not made by torch.export")
    return TORCH.get(first, "FakeTensor.fake_mode")


def new_size(fake_mode: Any, name: str, hint: int) -> torch.SymInt:
    """A new dynamic size among the fake tensors of `fake_mode`, at least 0; `hint`: an example."""
    symbolic = "torch.fx.experimental.symbolic_shapes:"
    kind = TORCH.find(symbolic + "DimDynamic").DYNAMIC
    create, wrap = (TORCH.find(f"{symbolic}ShapeEnv.{name}") for name in ("create_symbol", "create_symintnode"))
    env, source = (
        TORCH.get(fake_mode, "FakeTensorMode.shape_env"),
        TORCH.find("torch._dynamo.source:ConstantSource")(name),
    )
    symbol = create(env, hint, source, dynamic_dim=kind, do_not_specialize_zero_one=True)
    size: torch.SymInt = wrap(env, symbol, hint=hint, source=source)
    return size


def size_range(low: int, high: int) -> Any:
    """What `ExportedProgram.range_constraints` holds for a size that is from `low` to `high`."""
    return TORCH.find("torch.utils._sympy.value_ranges:ValueRanges")(low, high)


def structure(tree: Any) -> Any:
    """How `tree` (tuples, lists, dicts) is nested: a spec as the signatures of modules hold."""
    return TORCH.find("torch.utils._pytree:tree_structure")(tree)


def positions(spec: Any) -> Any:
    """The tree of a spec, with the number of each leaf, from 0, in its place."""
    return TORCH.find("torch.utils._pytree:tree_unflatten")(list(range(TORCH.get(spec, "TreeSpec.num_leaves"))), spec)


def put_graph(module: GraphModule, graph: Graph) -> None:
    """`module.graph = graph`, but no Python code is generated for it: that takes longer than most passes."""
    TORCH.set(module, "GraphModule._graph", graph)
    graph.owning_module = module


def program(**parts: Any) -> ExportedProgram:
    """ExportedProgram(**parts), but the Python code of its graph is generated when somebody calls its module or asks for it."""
    TORCH.find("torch.export.exported_program:_create_graph_module_for_export")
    lazy = TORCH.find("torch.fx._lazy_graph_module:_LazyGraphModule")
    with mock.patch("torch.export.exported_program._create_graph_module_for_export", lazy):
        return ExportedProgram(**parts)


@cache  # torch puts it together anew each time, and a graph has few ops
def op_name(target: Any) -> str:
    """What a node calls: "aten.add.Tensor"."""
    return str(target)


def is_metadata_assert(target: Any) -> bool:
    """Whether a node's target is torch.export's assert of a tensor's dtype, device and layout."""
    return target is _metadata_assert()


@cache
def _metadata_assert() -> Any:
    return TORCH.find("torch:ops.aten._assert_tensor_metadata.default")


@cache
def cast_op() -> Any:
    """What `Tensor.to` is in a decomposed graph."""
    return TORCH.find("torch:ops.aten._to_copy.default")


@cache
def view_op() -> Any:
    """What `Tensor.reshape` of fresh memory is in a decomposed graph."""
    return TORCH.find("torch:ops.aten._unsafe_view.default")


@cache
def softmax_ops() -> frozenset[Any]:
    """What a softmax is in a decomposed graph."""
    return frozenset(TORCH.find(f"torch:ops.aten.{name}.default") for name in ("_softmax", "_safe_softmax"))


def cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN, which must be available, has bfloat16 products on this CPU."""
    return bool(TORCH.find("torch:ops.mkldnn._is_mkldnn_bf16_supported")())


def cpu_multiplies_float16() -> bool:
    """Whether oneDNN has float16 products on this CPU; not where torch has no oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(TORCH.find("torch:ops.mkldnn._is_mkldnn_fp16_supported")())


def onnx_exporter_log() -> logging.Logger:
    """Where torch.onnx.export(dynamo=True) writes its warnings."""
    return logging.getLogger(TORCH.find("torch.onnx._internal.exporter:").__name__)


def onnx_exporter_knows(targets: Iterable[Any]) -> bool:
    """Whether torch.onnx.export has a translation for each of these ops of its own."""
    registration = "torch.onnx._internal.exporter._registration:ONNXRegistry"
    registry = TORCH.find(f"{registration}.from_torchlib")()
    decompositions = TORCH.find(f"{registration}.get_decomps")
    return all(decompositions(registry, target) for target in targets)


TopkRule = Callable[[Tensor, int], tuple[Tensor, Tensor] | None]


@contextmanager
def topk_rule(rule: TopkRule) -> Iterator[None]:
    """While it lasts, each top-k of the largest along the last dim is rule(tensor, k) -> (values, indices int64).

    However it is called: torch.topk, Tensor.topk, torch.ops.aten.topk, with or without `out`. None: torch's own.
    """

    def dispatch(self: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op not in (torch.ops.aten.topk.default, torch.ops.aten.topk.values):
            return op(*args, **kwargs)
        given = {**dict(zip(("self", "k", "dim", "largest", "sorted"), args, strict=False)), **kwargs}
        tensor, last = given["self"], given.get("dim", -1) in (-1, given["self"].dim() - 1)
        chosen = rule(tensor, int(given["k"])) if last and given.get("largest", True) else None
        if chosen is None:
            return op(*args, **kwargs)
        if op is torch.ops.aten.topk.default:
            return chosen
        return tuple(
            given[name].resize_(part.shape).copy_(part)
            for name, part in zip(("values", "indices"), chosen, strict=True)
        )

    base = TORCH.find("torch.utils._python_dispatch:TorchDispatchMode")
    with type("TopkRule", (base,), {"__torch_dispatch__": dispatch})():
        yield


def saved_element_type(number: int) -> torch.dtype:
    """What a `.pt2` calls by this number. Raises KeyError."""
    found: torch.dtype = TORCH.find("torch._export.serde.serialize:deserialize_scalar_type")(number)
    return found


def saved_program(
    document: Mapping[str, Any], weights: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> ExportedProgram:
    """The program that `document`, the JSON of a `.pt2`, describes, as torch.export.load makes it; but that unpickles whatever
    an archive asks for, and here tensors come as tensors. Strings in `document` are evaluated: see `runtime/pt2_graph.py`.
    Raises anything."""
    schema = TORCH.find("torch._export.serde.schema:ExportedProgram")
    program = TORCH.find("torch._export.serde.serialize:_dict_to_dataclass")(schema, document)
    deserializer = TORCH.find("torch._export.serde.serialize:ExportedProgramDeserializer")()
    loaded: ExportedProgram = deserializer.deserialize(program, dict(weights), dict(constants), b"")
    return loaded
