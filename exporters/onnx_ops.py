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

DOMAIN, VERSION = "mla2dsa", 1
OPSET = 20  # every TensorRT from 10.3 on reads it

_FLOAT = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)")
_INT = ("tensor(int32)", "tensor(int64)")
_TYPES = {"T": _FLOAT, "V": _FLOAT, "W": _FLOAT, "I": _INT, "J": ("tensor(int32)",), "L": ("tensor(int64)",)}
_INTEGER, _REAL, _STRING = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT, OpSchema.AttrType.STRING
_NAMESPACE = ("plugin_namespace", _STRING)

# name: (inputs, output type, attributes)
_NODES: dict[str, tuple[dict[str, str], str, tuple[tuple[str, Any], ...]]] = {
    "LightningIndexer": (
        {"q": "T", "k": "T", "weights": "V", "key_begin": "I", "key_end": "I"}, "J", (("topk", _INTEGER), _NAMESPACE),
    ),
    "SparseMLA": (
        {"q": "T", "kv": "T", "indices": "J"}, "T", (("scale", _REAL), ("kv_lora_rank", _INTEGER), _NAMESPACE),
    ),
    "CacheWrite": ({"cache": "T", "new": "T", "slots": "I"}, "T", (_NAMESPACE,)),
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


def _infer_indexer(context: Any) -> None:
    """int32 [B,T,min(topk,S)]; the last dim is left open where S is."""
    out = onnx.TypeProto()
    out.tensor_type.elem_type = onnx.TensorProto.INT32
    q, k = context.get_input_type(0).tensor_type, context.get_input_type(1).tensor_type
    if q.HasField("shape") and k.HasField("shape"):
        dims = out.tensor_type.shape.dim
        for source in q.shape.dim[:2]:
            dims.add().CopyFrom(source)
        last, slots = dims.add(), k.shape.dim[1]
        if slots.HasField("dim_value"):
            last.dim_value = min(context.get_attribute("topk").i, slots.dim_value)
    context.set_output_type(0, out)


def _infer_attention(context: Any) -> None:
    """[B,T,H,R] in the type of q."""
    q = context.get_input_type(0)
    out = onnx.TypeProto()
    out.tensor_type.elem_type = q.tensor_type.elem_type
    if q.tensor_type.HasField("shape"):
        for source in q.tensor_type.shape.dim[:3]:
            out.tensor_type.shape.dim.add().CopyFrom(source)
        out.tensor_type.shape.dim.add().dim_value = context.get_attribute("kv_lora_rank").i
    context.set_output_type(0, out)


def _infer_first(context: Any) -> None:
    """Type and shape of the first input."""
    context.set_output_type(0, context.get_input_type(0))


_INFERENCE: dict[str, Callable[[Any], None]] = {
    "LightningIndexer": _infer_indexer,
    "SparseMLA": _infer_attention,
    "CacheWrite": _infer_first,
    "MoEExperts": _infer_first,
    STACKED_MOE: _infer_first,
}
