"""Element types, once: how each library that they pass through spells them. Importing this imports none of the libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ElementType:
    """name: torch's, and that of our manifests; "" where torch has none. safetensors: in its headers, "" where it has none.
    triton: in kernels and programs. onnx: in TensorProto and onnx_ir.DataType. server: in Triton Inference Server's
    configuration, behind TYPE_."""

    name: str
    bits: int
    safetensors: str
    triton: str = ""
    onnx: str = ""
    server: str = ""


# safetensors' list is that of its own specification (safetensors/src/tensor.rs, Dtype).
ELEMENT_TYPES = (
    ElementType("float32", 32, "F32", "fp32", "FLOAT", "FP32"),
    ElementType("float16", 16, "F16", "fp16", "FLOAT16", "FP16"),
    ElementType("bfloat16", 16, "BF16", "bf16", "BFLOAT16", "BF16"),
    ElementType("float64", 64, "F64", "fp64", "DOUBLE", "FP64"),
    ElementType("int64", 64, "I64", "i64", "INT64", "INT64"),
    ElementType("int32", 32, "I32", "i32", "INT32", "INT32"),
    ElementType("int16", 16, "I16"),
    ElementType("int8", 8, "I8"),
    ElementType("uint64", 64, "U64"),
    ElementType("uint32", 32, "U32"),
    ElementType("uint16", 16, "U16"),
    ElementType("uint8", 8, "U8", "u8"),
    ElementType("bool", 8, "BOOL"),
    ElementType("complex64", 64, "C64"),
    ElementType("float8_e4m3fn", 8, "F8_E4M3", "fp8e4nv"),
    ElementType("float8_e5m2", 8, "F8_E5M2", "fp8e5"),
    ElementType("float8_e8m0fnu", 8, "F8_E8M0"),
    ElementType("float8_e4m3fnuz", 8, "F8_E4M3FNUZ"),
    ElementType("float8_e5m2fnuz", 8, "F8_E5M2FNUZ"),
    ElementType("", 6, "F6_E2M3"),
    ElementType("", 6, "F6_E3M2"),
    ElementType("", 4, "F4"),
)
BY_NAME = {kind.name: kind for kind in ELEMENT_TYPES if kind.name}
BY_SAFETENSORS = {kind.safetensors: kind for kind in ELEMENT_TYPES}
BY_TRITON = {kind.triton: kind for kind in ELEMENT_TYPES if kind.triton}
MODEL_DTYPES = ("float32", "float16", "bfloat16")  # what a model is exported, cached and run in


def torch_dtype(name: str) -> torch.dtype:
    """By torch's name. Raises KeyError for one that is not in the table."""
    import torch

    found: torch.dtype = getattr(torch, BY_NAME[name].name)
    return found


def element_type(dtype: torch.dtype) -> ElementType:
    """Raises KeyError for one that is not in the table."""
    return BY_NAME[str(dtype).removeprefix("torch.")]
