"""The two DSA ops on CPU tensors in C++ (`native/`): bfloat16 and float32, on what instructions this processor has.

Paths, the fastest first: `amx` (tiles of bfloat16), `avx512_bf16` (bfloat16 multiplied in pairs), `avx512`, `avx2`, and `portable`,
for which the compiler is asked for nothing but what all processors of the kind have (NEON, SSE2). Each is compiled with the
machine's compiler at its first use and kept. Where none can be had `cpu` goes on with torch alone: the same results, slower.

MLA2DSA_CPU names the path to take, or `torch` for none of them; a type that the path does not serve goes on in torch. `taken`
says which it is, `status` what keeps a path from it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .native_build import BuildError, build_library

CPU_ENV = "MLA2DSA_CPU"
TORCH = "torch"
_SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=fast")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_ON_AMX = ("lightning_indexer.cpp", "sparse_mla.cpp", "support.cpp", "amx.h", "work.h")
_ON_VECTORS = ("vector_indexer.cpp", "vector_sparse_mla.cpp", "attention.h", "select.h", "vectors.h", "work.h")
_SCORES_BYTES = 4 * 2**20  # of a thread: more queries at once would fall out of its cache
_GRAIN = 8 * 2**20  # products that are worth a thread, which takes as long to start as some hundred thousand of them
_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}  # as functions have them
_ARGUMENTS = {
    "sparse_mla": (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 7, ctypes.c_float, ctypes.c_int64),
    "lightning_indexer": (*[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 8),
}


@dataclass(frozen=True)
class NativePath:
    """needs: flags of the processor in /proc/cpuinfo. flags: for the compiler, beside those of all paths."""

    sources: tuple[str, ...]
    needs: frozenset[str]
    flags: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


_BOTH = (torch.bfloat16, torch.float32)
_WIDE = frozenset(("avx512f", "avx512bw", "avx512dq", "avx512vl"))
PATHS = {
    "amx": NativePath(
        _ON_AMX,
        _WIDE | {"avx512_bf16", "amx_tile", "amx_bf16"},
        (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        (torch.bfloat16,),
    ),
    "avx512_bf16": NativePath(_ON_VECTORS, _WIDE | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16"), _BOTH),
    "avx512": NativePath(_ON_VECTORS, _WIDE, _AVX512, _BOTH),
    "avx2": NativePath(_ON_VECTORS, frozenset(("avx2", "fma")), ("-mavx2", "-mfma"), _BOTH),
    "portable": NativePath(_ON_VECTORS, frozenset(), (), _BOTH),
}


def taken(dtype: torch.dtype) -> str:
    """The name of the path that ops on CPU tensors of this dtype take, or "torch". Raises UserError if MLA2DSA_CPU names one
    that does not exist, or cannot be had here."""
    forced = os.environ.get(CPU_ENV)
    if not forced:
        able = (name for name, path in PATHS.items() if dtype in path.dtypes and library(name) is not None)
        return next(able, TORCH)
    if forced == TORCH:
        return TORCH
    if forced not in PATHS:
        raise UserError(f"{CPU_ENV}={forced} is not known: unset it, or set it to one of {', '.join((*PATHS, TORCH))}")
    if library(forced) is None:
        raise UserError(f"{CPU_ENV}={forced} cannot be had here: {status(forced)}")
    return forced if dtype in PATHS[forced].dtypes else TORCH


def summary() -> str:
    """In one line what this CPU does: the path of each type, or why there is none."""
    try:
        ways = {name: taken(dtype) for dtype, name in _NAMES.items()}
    except UserError as error:
        return str(error)
    if set(ways.values()) == {TORCH}:
        return f"{CPU_ENV}={TORCH}" if os.environ.get(CPU_ENV) else status("portable")
    return f"usable: {', '.join(f'{name} on {way}' for name, way in ways.items())}"


def status(name: str) -> str:
    """ "usable", or why a path is not: one line."""
    return _load(name)[1]


def library(name: str) -> ctypes.CDLL | None:
    return _load(name)[0]


@cache
def _load(name: str) -> tuple[ctypes.CDLL | None, str]:
    path = PATHS[name]
    if sys.platform != "linux" or (path.needs and platform.machine() != "x86_64"):
        return None, f"needs Linux{' on x86-64' if path.needs else ''}"
    missing = path.needs - _processor_flags()
    if missing:
        return None, f"this processor has no {', '.join(sorted(missing))}"
    try:
        built = build_library(f"mla2dsa_{name}", [_SOURCES / file for file in path.sources], (*_FLAGS, *path.flags))
        found = ctypes.CDLL(str(built))
    except (BuildError, OSError) as error:
        return None, str(error)
    for op, arguments in _ARGUMENTS.items():
        for dtype in path.dtypes:
            function = getattr(found, f"mla2dsa_{op}_{_NAMES[dtype]}")
            function.argtypes, function.restype = arguments, ctypes.c_bool
    if name == "amx" and not found.mla2dsa_amx_usable():
        return None, "the operating system does not let this process use AMX tiles"
    return found, "usable"


@cache
def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def lightning_indexer(
    name: str, q: Tensor, k: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int, budget_mb: int
) -> Tensor:
    """As `reference.lightning_indexer`, on the path `name`: int32 [B,T,min(topk,S)]. Scores are summed in float32; denormal
    bfloat16 may count as 0."""
    (batch, tokens, heads, width), slots = q.shape, k.shape[1]
    out = q.new_empty((batch, tokens, min(topk, slots)), dtype=torch.int32)
    if out.numel() == 0:
        return out
    begin, end = (bound.clamp(0, slots).long().contiguous() for bound in (key_begin, key_end))
    q, k, weights = q.contiguous(), k.contiguous(), weights.float().contiguous()
    threads = _threads(batch * tokens * slots * heads * width)
    budget = max(1, min(_SCORES_BYTES, budget_mb * 2**20 // (2 * threads)))
    _call(
        name, "lightning_indexer", q, k, weights, begin, end, out,
        batch, tokens, slots, heads, width, out.shape[2], budget, threads,
    )  # fmt: skip
    return out


def sparse_mla(name: str, q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """As `reference.sparse_mla`, on the path `name`: [B,T,H,R]. Softmax in float32; where bfloat16 is multiplied as it is, the
    weights are rounded to it for the product with the values."""
    (batch, tokens, heads, width), slots, selected = q.shape, kv.shape[1], indices.shape[2]
    out = q.new_empty((batch, tokens, heads, kv_lora_rank))
    if out.numel() == 0:
        return out
    q, kv, indices = q.contiguous(), kv.contiguous(), indices.contiguous()
    threads = _threads(batch * tokens * selected * heads * (width + kv_lora_rank))
    _call(
        name, "sparse_mla", q, kv, indices, out,
        batch, tokens, slots, heads, width, kv_lora_rank, selected, scale, threads,
    )  # fmt: skip
    return out


def _threads(products: int) -> int:
    return max(1, min(torch.get_num_threads(), products // _GRAIN))


def _call(name: str, op: str, *arguments: Tensor | int | float) -> None:
    values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in arguments]
    first = arguments[0]
    assert isinstance(first, Tensor)
    if not getattr(library(name), f"mla2dsa_{op}_{_NAMES[first.dtype]}")(*values):
        raise MemoryError(f"{op}: not enough memory for its buffers")
