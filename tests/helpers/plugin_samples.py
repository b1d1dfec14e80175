"""Real plugins in small: their programs, the fields they are given, and tensors of the sizes they run at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from mla2dsa.kernels.gpu.binaries.bundle import BundledKernel, bundled, write_bundle
from mla2dsa.kernels.gpu.binaries.cache import compile_cached
from mla2dsa.kernels.gpu.binaries.manifest import kernel_name
from mla2dsa.kernels.gpu.launch import DTYPES
from mla2dsa.kernels.gpu.programs.op_program import OpProgram, op_program, spec_of
from mla2dsa.kernels.gpu.programs.plugin_text import write_op
from mla2dsa.kernels.gpu.programs.program import Variant

OPEN = (None, None)


def indexer(
    heads: int,
    width: int,
    topk: int,
    kind: str = "bf16",
    weights: str = "fp32",
    bounds: str = "i64",
    sms: Sequence[int] = (80, 90),
) -> OpProgram:
    shapes = ((*OPEN, heads, width), (*OPEN, width), (*OPEN, heads), OPEN, OPEN)
    return op_program(spec_of("LightningIndexer"), (kind, kind, weights, bounds, bounds), shapes, {"topk": topk}, sms)


def attention(heads: int, rank: int, rope: int, kind: str = "bf16", sms: Sequence[int] = (80, 90)) -> OpProgram:
    shapes = ((*OPEN, heads, rank + rope), (*OPEN, rank + rope), (*OPEN, None))
    attributes = {"scale": 0.1147, "kv_lora_rank": rank}
    return op_program(spec_of("SparseMLA"), (kind, kind, "i32"), shapes, attributes, sms)


def cache_write_of(width: int, sms: Sequence[int], kind: str = "bf16", slots: str = "i64") -> OpProgram:
    return op_program(spec_of("CacheWrite"), (kind, kind, slots), ((*OPEN, width), (*OPEN, width), OPEN), {}, sms)


OPS = {
    "indexer-h64-d128-k2048": indexer(64, 128, 2048),
    "indexer-h8-d128-k64": indexer(8, 128, 64, weights="bf16", bounds="i32"),
    "indexer-h16-d32-k8-fp32": indexer(16, 32, 8, "fp32"),
    "attention-h128-r512": attention(128, 512, 64),
    "attention-h16-r64-fp16": attention(16, 64, 16, "fp16"),
    "cache-d576": cache_write_of(576, (80, 90)),
    "cache-d80-fp32": cache_write_of(80, (80, 90), "fp32", "i32"),
}
# (batch, queries, slots)
SIZES = [
    (1, 1, 1),
    (1, 1, 70_000),
    (2, 1, 4097),
    (140, 1, 300),
    (1, 7, 2048),
    (1, 512, 512),
    (3, 600, 5000),
    (1, 2048, 40_000),
]


@cache
def fields(name: str) -> tuple[bytes, bytes, dict[str, BundledKernel]]:
    op = OPS[name]
    made: dict[Variant, dict[int, Any]] = {}
    for variant, sm in op.binaries():
        made.setdefault(variant, {})[sm] = compile_cached(variant, sm)
    kernels = {kernel_name(variant): bundled(variant, by_sm) for variant, by_sm in made.items()}
    return write_op(op, kernel_name).encode(), write_bundle(kernels), kernels


def tensors(op: OpProgram, batch: int, queries: int, slots: int) -> list[torch.Tensor]:
    sizes: dict[str, Any] = {"B": batch, "T": queries, "S": slots, "C": slots, "K": min(2048, slots)}
    spec = spec_of(op.op)
    made = []
    for (kind, rules), operand in zip(op.inputs, spec.inputs, strict=True):
        shape = [
            int(rule.args[0]) if rule is not None and rule.op == "int" else sizes[letter]  # type: ignore[arg-type]
            for rule, letter in zip(rules, operand.dims, strict=True)
        ]
        made.append(torch.empty(shape, dtype=DTYPES[kind]))  # nobody reads them
    return made
