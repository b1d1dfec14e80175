"""The ONNX domain `mla2dsa`: schemas of its nodes, and how torch ops become them.

    LightningIndexer(q [B,T,HI,dI], k [B,S,dI], weights [B,T,HI], key_begin [B,T], key_end [B,T]; topk) -> int32 [B,T,min(topk,S)]
    SparseMLA(q [B,T,H,R+dr], kv [B,S,R+dr], indices [B,T,K]; scale, kv_lora_rank) -> [B,T,H,R]
    CacheWrite(cache [B,C,d], new [B,T,d], slots [B,T]) -> [B,C,d]
    MoEExperts(hidden [N,D], top_k_index [N,k], top_k_weights [N,k], gate_proj [P,I,D], up_proj [Q,I,D], down_proj [R,I,D],
               rows [E,3]; activation) -> [N,D]

Semantics are those of `torch.ops.mla2dsa`, but for MoEExperts' weights: rows[e] (int64) say where in gate_proj, up_proj and
down_proj those of expert e lie (down_proj to be read as [D,I]; all three may be the same tensor). An expert with rows -1
adds nothing.

All but MoEExperts carry plugin_namespace="mla2dsa": TensorRT then takes our plugin where it is loaded, and the local function
of the same name (`onnx_functions`) where it is not.

CacheWrite is a node of our own rather than ONNX TensorScatter, because TensorRT takes that one in place for a static cache
length, four dims and one contiguous run per sequence only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript import opset20, values

from ...kernels.op_spec import KINDS, OP_SPECS, OpSpec

DOMAIN, VERSION = "mla2dsa", 1
OPSET = 20  # every TensorRT from 10.3 on reads it

_STRING = OpSchema.AttrType.STRING
_ATTRIBUTE = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT}
_ELEMENT = {"float32": "float", "float64": "double"}  # where ONNX calls a type otherwise
_TYPES = {kind: tuple(f"tensor({_ELEMENT.get(name, name)})" for name in names) for kind, names in KINDS.items()}
_TYPES |= {"W": _TYPES["T"], "L": ("tensor(int64)",)}

# name: (inputs, output type, attributes)
_NODES: dict[str, tuple[dict[str, str], str, tuple[tuple[str, Any], ...]]] = {
    spec.node: (
        {operand.name: operand.kind for operand in spec.inputs},
        spec.output.kind,
        (*((name, _ATTRIBUTE[kind]) for name, kind in spec.attributes), ("plugin_namespace", _STRING)),
    )
    for spec in OP_SPECS
}
_NODES |= {
    "MoEExperts": (
        {"hidden": "T", "top_k_index": "I", "top_k_weights": "V", "gate_proj": "W", "up_proj": "W", "down_proj": "W", "rows": "L"},
        "T", (("activation", _STRING),),
    ),
}  # fmt: skip
# What the translation emits for MoE: experts stacked as torch has them. `onnx_moe` turns it into MoEExperts.
STACKED_MOE = "StackedMoEExperts"
_NODES[STACKED_MOE] = (
    {"hidden": "T", "top_k_index": "I", "top_k_weights": "V", "gate_up_proj": "T", "down_proj": "T"}, "T",
    (("activation", _STRING),),
)  # fmt: skip


def attribute_names(name: str) -> list[str]:
    """The attributes a node `name` of our domain carries."""
    return [attribute for attribute, _ in _NODES[name][2]]


def register_schemas() -> None:
    """Make the domain known to onnx (checker, shape inference) and onnxscript, once per process."""
    for name, (inputs, output, attributes) in _NODES.items():
        if onnx.defs.has(name, DOMAIN):
            continue
        used = sorted({*inputs.values(), output})
        schema = OpSchema(
            name, DOMAIN, VERSION,
            inputs=[OpSchema.FormalParameter(field, kind) for field, kind in inputs.items()],
            outputs=[OpSchema.FormalParameter("out", output)],
            type_constraints=[(kind, list(_TYPES[kind]), "") for kind in used],
            attributes=[OpSchema.Attribute(field, kind, "", required=True) for field, kind in attributes],
        )  # fmt: skip
        schema.set_type_and_shape_inference_function(_INFERENCE[name])
        onnx.defs.register_schema(schema)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translation table of `torch.onnx.export`. Needs `register_schemas`."""
    ours: Any = values.Opset(DOMAIN, VERSION)

    def lightning_indexer(q: Any, k: Any, weights: Any, key_begin: Any, key_end: Any, topk: int) -> Any:
        return ours.LightningIndexer(q, k, weights, key_begin, key_end, topk=topk, plugin_namespace=DOMAIN)

    def sparse_mla(q: Any, kv: Any, indices: Any, scale: float, kv_lora_rank: int) -> Any:
        return ours.SparseMLA(q, kv, indices, scale=scale, kv_lora_rank=kv_lora_rank, plugin_namespace=DOMAIN)

    def cache_write(cache: Any, new: Any, slots: Any) -> Any:
        return ours.CacheWrite(cache, new, slots, plugin_namespace=DOMAIN)

    def moe_experts(hidden: Any, index: Any, weights: Any, gate_up_proj: Any, down_proj: Any, activation: str) -> Any:
        return ours.StackedMoEExperts(hidden, index, weights, gate_up_proj, down_proj, activation=activation)

    def sym_stride(tensor: Any, dim: int) -> Any:
        """The exporter's own decomposition writes the size of an input's inner dims as a stride; inputs are contiguous."""
        if tensor.producer() is not None or dim + 2 != len(tensor.shape):
            raise NotImplementedError(f"stride {dim} of {tensor.name} in an exported graph")
        axis: Any = opset20.Constant(value_ints=[0])
        return opset20.Squeeze(opset20.Shape(tensor, start=dim + 1, end=dim + 2), axis)

    def to_dtype(
        tensor: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None
    ) -> Any:
        return opset20.Cast(tensor, to=dtype)

    def to_device(
        tensor: Any, device: Any = None, dtype: int = -1, non_blocking: bool = False, copy: bool = False
    ) -> Any:
        return opset20.Identity(tensor) if dtype in (-1, None) else opset20.Cast(tensor, to=dtype)

    ops, aten = torch.ops.mla2dsa, torch.ops.aten
    return {
        aten.sym_stride.int: sym_stride, aten.to.dtype: to_dtype, aten.to.device: to_device,
        ops.lightning_indexer.default: lightning_indexer, ops.sparse_mla.default: sparse_mla,
        ops.cache_write.default: cache_write, ops.moe_experts.default: moe_experts,
    }  # fmt: skip


def _inference(spec: OpSpec) -> Callable[[Any], None]:
    """Type and shape of the output; a dim that depends on an open one is left open."""

    def infer(context: Any) -> None:
        inputs = [context.get_input_type(number).tensor_type for number in range(len(spec.inputs))]
        out = onnx.TypeProto()
        model = spec.output_input()
        out.tensor_type.elem_type = onnx.TensorProto.INT32 if model is None else inputs[model].elem_type
        if all(tensor.HasField("shape") for tensor in inputs):
            sizes: dict[str, Any] = spec.sizes([tensor.shape.dim for tensor in inputs])
            for name, kind in spec.attributes:
                if kind is int:
                    sizes[name] = onnx.TensorShapeProto.Dimension(dim_value=context.get_attribute(name).i)
            out.tensor_type.shape.dim.extend(spec.output_shape(sizes, _lesser))
        context.set_output_type(0, out)

    return infer


def _lesser(a: Any, b: Any) -> Any:
    dim = onnx.TensorShapeProto.Dimension()
    if a.HasField("dim_value") and b.HasField("dim_value"):
        dim.dim_value = min(a.dim_value, b.dim_value)
    return dim


def _infer_first(context: Any) -> None:
    """Type and shape of the first input."""
    context.set_output_type(0, context.get_input_type(0))


_INFERENCE: dict[str, Callable[[Any], None]] = {
    **{spec.node: _inference(spec) for spec in OP_SPECS},
    "MoEExperts": _infer_first,
    STACKED_MOE: _infer_first,
}
