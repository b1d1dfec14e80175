"""The ops on CUDA tensors: which program, of which form, for this device and these shapes.

Also serves CPU tensors, in the interpreter: slow, for tests. What has no kernel runs the reference: float64, GPUs older
than sm_80, float8 written on GPUs older than sm_89, sparse MLA over packed rows with queries that are not bfloat16, and
an indexer in float32 with more than 64 heads of more than 128 channels where shared memory is small.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from .. import reference, reference_fp8
from .launch import TRITON_NAMES, Launcher
from .programs.cache_program import CacheWriteCase
from .programs.indexer_program import BUDGET_MB, IndexerCase, indexer_guards
from .programs.program import Expr, LaunchProgram
from .programs.quantise_program import PackLatentCase, QuantiseRowsCase
from .programs.sparse_program import AttentionCase, PackedAttentionCase, attention_guards
from .programs.tuning import NoBlocks

_FIRST_SM, _FIRST_FP8_SM = 80, 89
_INTERPRETER_UNITS = 4  # as if the interpreter had so many multiprocessors


def lightning_indexer(
    q: Tensor, k: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int, budget_mb: int = BUDGET_MB
) -> Tensor:
    """As `reference.lightning_indexer`."""
    if q.dtype == torch.float64 or weights.dtype == torch.float64 or not _usable(q):
        return reference.lightning_indexer(q, k, weights, key_begin, key_end, topk)
    try:
        return _indexer((q, k), weights, key_begin, key_end, topk, budget_mb)
    except NoBlocks:
        return reference.lightning_indexer(q, k, weights, key_begin, key_end, topk)


def lightning_indexer_fp8(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    key_begin: Tensor,
    key_end: Tensor,
    topk: int,
    budget_mb: int = BUDGET_MB,
) -> Tensor:
    """As `reference_fp8.lightning_indexer_fp8`. Before sm_89 the products are those of bfloat16, which holds every e4m3."""
    if weights.dtype == torch.float64 or not _usable(q):
        return reference_fp8.lightning_indexer_fp8(q, k, k_scale, weights, key_begin, key_end, topk)
    if not _has_fp8(q):
        q, k = q.to(torch.bfloat16), k.to(torch.bfloat16)
    return _indexer((q, k, k_scale), weights, key_begin, key_end, topk, budget_mb)


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """As `reference.sparse_mla`."""
    if q.dtype == torch.float64 or not _usable(q):
        return reference.sparse_mla(q, kv, indices, scale, kv_lora_rank)
    heads, rope = q.shape[2], q.shape[3] - kv_lora_rank
    form = _form(attention_guards(heads), q)
    case = AttentionCase(TRITON_NAMES[q.dtype], heads, kv_lora_rank, rope, scale, _architecture(q), form)
    return _run(case, q, kv, indices)[0]


def sparse_mla_fp8(q: Tensor, kv_packed: Tensor, indices: Tensor, scale: float) -> Tensor:
    """As `reference_fp8.sparse_mla_fp8`."""
    if q.dtype != torch.bfloat16 or not _usable(q):
        return reference_fp8.sparse_mla_fp8(q, kv_packed, indices, scale)
    heads, form = q.shape[2], _form(attention_guards(q.shape[2]), q)
    return _run(PackedAttentionCase(heads, scale, _architecture(q), form, _has_fp8(q)), q, kv_packed, indices)[0]


def cache_write(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """As `reference.cache_write`."""
    if torch.float64 in (cache.dtype, new.dtype) or not _usable(cache):
        return reference.cache_write(cache, new, slots)
    dtype, new_dtype, slot_dtype = (TRITON_NAMES[tensor.dtype] for tensor in (cache, new, slots))
    case = CacheWriteCase(dtype, new_dtype, cache.shape[2], _architecture(cache), slot_dtype)
    return _run(case, cache, new, slots)[0]


def quantize_fp8_rows(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """As `reference_fp8.quantize_fp8_rows`."""
    if x.dtype == torch.float64 or not _usable(x) or not _has_fp8(x):
        return reference_fp8.quantize_fp8_rows(x, ue8m0)
    rows = x.reshape(-1, x.shape[-1])
    values, scales = _run(QuantiseRowsCase(TRITON_NAMES[x.dtype], x.shape[-1], ue8m0, _architecture(x)), rows)
    return values.view(x.shape), scales.view(x.shape[:-1])


def pack_latent_fp8(kv: Tensor) -> Tensor:
    """As `reference_fp8.pack_latent_fp8`."""
    if kv.dtype == torch.float64 or not _usable(kv) or not _has_fp8(kv):
        return reference_fp8.pack_latent_fp8(kv)
    return _run(PackLatentCase(TRITON_NAMES[kv.dtype], _architecture(kv)), kv)[0]


def attention_mass(q: Tensor, kv: Tensor, key_begin: Tensor, key_end: Tensor, scale: float) -> Tensor:
    """The reference: calibration runs it on few rows."""
    return reference.attention_mass(q, kv, key_begin, key_end, scale)


def _indexer(
    queries_and_keys: tuple[Tensor, ...], weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int, budget_mb: int
) -> Tensor:
    q = queries_and_keys[0]
    heads, width = q.shape[2:]
    form = _form(indexer_guards(heads), q)
    if key_begin.dtype != key_end.dtype:
        key_begin, key_end = key_begin.long(), key_end.long()
    case = IndexerCase(
        TRITON_NAMES[q.dtype], heads, width, topk, _architecture(q), form, scaled=len(queries_and_keys) == 3,
        weights=TRITON_NAMES[weights.dtype], bounds=TRITON_NAMES[key_begin.dtype], budget_mb=budget_mb,
    )  # fmt: skip
    return _run(case, *queries_and_keys, weights, key_begin, key_end)[0]


def _form(guards: Mapping[str, Expr], q: Tensor) -> str:
    """The first whose guard is above 0."""
    known = {"units": _units(q)}
    return next(form for form, guard in guards.items() if guard.value([q.shape], known) > 0)


class Case(Hashable, Protocol):
    """What decides an op's program; each is made once."""

    def program(self) -> LaunchProgram: ...


@lru_cache(maxsize=1024)
def _launcher(case: Case, interpret: bool) -> Launcher:
    return Launcher(case.program(), interpret)


def _run(case: Case, *inputs: Tensor) -> tuple[Tensor, ...]:
    launcher = _launcher(case, inputs[0].device.type == "cpu")
    return launcher(*(tensor.contiguous() for tensor in inputs))


def _architecture(tensor: Tensor) -> int:
    """80 for compute capability 8.0; 0 for the interpreter."""
    return 0 if tensor.device.type == "cpu" else _properties(tensor.device)[0]


def _units(tensor: Tensor) -> int:
    """Multiprocessors."""
    return _INTERPRETER_UNITS if tensor.device.type == "cpu" else _properties(tensor.device)[1]


@lru_cache(maxsize=64)
def _properties(device: torch.device) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count


def _usable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or (tensor.device.type == "cuda" and _architecture(tensor) >= _FIRST_SM)


def _has_fp8(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or _architecture(tensor) >= _FIRST_FP8_SM
