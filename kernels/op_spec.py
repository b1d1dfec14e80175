"""The ops that every runtime has to provide, declared once: the schemas of torch and of ONNX, and the TensorRT plugins'
types and shapes, come from here; `contracts` says the same as errors a person can read.

A dim is a letter (the same size wherever it stands), the name of an attribute, or min(a,b) of two of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Size = TypeVar("Size")

# Element types by the letter of an operand's kind; operands of one letter have the same type.
KINDS = {
    "T": ("bfloat16", "float16", "float32", "float64"),
    "V": ("bfloat16", "float16", "float32", "float64"),
    "I": ("int32", "int64"),
    "J": ("int32",),
}


@dataclass(frozen=True)
class Operand:
    """A tensor that goes in or comes out; kind: a letter of KINDS."""

    name: str
    kind: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class OpSpec:
    """name: in torch.ops.mla2dsa. node: in the ONNX domain and of the TensorRT plugin. attributes: names and types, in the
    order of the arguments after the tensors."""

    name: str
    node: str
    inputs: tuple[Operand, ...]
    attributes: tuple[tuple[str, type], ...]
    output: Operand

    def torch_schema(self) -> str:
        """(Tensor q, ..., int topk) -> Tensor"""
        arguments = [f"Tensor {operand.name}" for operand in self.inputs]
        arguments += [f"{kind.__name__} {name}" for name, kind in self.attributes]
        return f"({', '.join(arguments)}) -> Tensor"

    def sizes(self, shapes: Sequence[Sequence[Size]]) -> dict[str, Size]:
        """Size of each letter, where it comes up first in the shapes of the inputs."""
        found: dict[str, Size] = {}
        for operand, shape in zip(self.inputs, shapes, strict=True):
            for letter, size in zip(operand.dims, shape, strict=True):
                found.setdefault(letter, size)
        return found

    def output_shape(self, sizes: Mapping[str, Size], minimum: Callable[[Size, Size], Size]) -> list[Size]:
        """From the sizes of the letters and the attributes."""
        return [_size(dim, sizes, minimum) for dim in self.output.dims]

    def output_input(self) -> int | None:
        """Number of the first input of the output's type, None if no input has it."""
        return next((n for n, operand in enumerate(self.inputs) if operand.kind == self.output.kind), None)


def _size(dim: str, sizes: Mapping[str, Size], minimum: Callable[[Size, Size], Size]) -> Size:
    if dim.startswith("min("):
        a, b = dim.removeprefix("min(").removesuffix(")").split(",")
        return minimum(sizes[a], sizes[b])
    return sizes[dim]


LIGHTNING_INDEXER = OpSpec(
    "lightning_indexer",
    "LightningIndexer",
    (
        Operand("q", "T", ("B", "T", "HI", "dI")),
        Operand("k", "T", ("B", "S", "dI")),
        Operand("weights", "V", ("B", "T", "HI")),
        Operand("key_begin", "I", ("B", "T")),
        Operand("key_end", "I", ("B", "T")),
    ),
    (("topk", int),),
    Operand("out", "J", ("B", "T", "min(topk,S)")),
)
SPARSE_MLA = OpSpec(
    "sparse_mla",
    "SparseMLA",
    (
        Operand("q", "T", ("B", "T", "H", "D")),
        Operand("kv", "T", ("B", "S", "D")),
        Operand("indices", "J", ("B", "T", "K")),
    ),
    (("scale", float), ("kv_lora_rank", int)),
    Operand("out", "T", ("B", "T", "H", "kv_lora_rank")),
)
CACHE_WRITE = OpSpec(
    "cache_write",
    "CacheWrite",
    (
        Operand("cache", "T", ("B", "C", "d")),
        Operand("new", "T", ("B", "T", "d")),
        Operand("slots", "I", ("B", "T")),
    ),
    (),
    Operand("out", "T", ("B", "C", "d")),
)
OP_SPECS = (LIGHTNING_INDEXER, SPARSE_MLA, CACHE_WRITE)
NODES = tuple(spec.node for spec in OP_SPECS)  # their names in ONNX and as plugins
