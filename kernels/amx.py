"""The two DSA ops in bfloat16 on CPUs with AMX tiles (Intel Xeon from Sapphire Rapids on): C++ in `native/`.

Compiled with the machine's compiler at the first use and kept. Where the CPU has no such tiles or there is no compiler,
`cpu` goes on with torch alone: the same results, slower. `status` says which it is, and why.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .native_build import BuildError, build_library

_SOURCES = Path(__file__).parent / "native"
_FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden",
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16",
)  # fmt: skip
_SCORES_BYTES = 4 * 2**20  # of a thread: more queries at once would fall out of its cache
_FUNCTIONS = {
    "mla2dsa_amx_usable": (),
    "mla2dsa_sparse_mla": (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 7, ctypes.c_float, ctypes.c_int64),
    "mla2dsa_lightning_indexer": (*[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 8),
}


def usable(*tensors: Tensor) -> bool:
    """Whether the ops here take these tensors: bfloat16, on a machine that can."""
    return all(tensor.dtype == torch.bfloat16 for tensor in tensors) and library() is not None


def status() -> str:
    """ "usable", or why not: one line."""
    return _load()[1]


def library() -> ctypes.CDLL | None:
    return _load()[0]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None, "needs Linux on x86-64"
    if "amx_bf16" not in _processor_flags():
        return None, "this processor has no AMX tiles of bfloat16"
    sources = sorted(_SOURCES.glob("*.cpp")) + sorted(_SOURCES.glob("*.h"))
    try:
        found = ctypes.CDLL(str(build_library("mla2dsa_amx", sources, _FLAGS)))
    except (BuildError, OSError) as error:
        return None, str(error)
    for name, arguments in _FUNCTIONS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, ctypes.c_bool
    if not found.mla2dsa_amx_usable():
        return None, "the operating system does not let this process use AMX tiles"
    return found, "usable"


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def lightning_indexer(
    q: Tensor, k: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int, budget_mb: int
) -> Tensor:
    """As `reference.lightning_indexer`, for q and k in bfloat16: int32 [B,T,min(topk,S)]. Scores are summed in float32;
    denormal inputs count as 0."""
    (batch, tokens, heads, width), slots = q.shape, k.shape[1]
    out = q.new_empty((batch, tokens, min(topk, slots)), dtype=torch.int32)
    if out.numel() == 0:
        return out
    begin, end = (bound.clamp(0, slots).long().contiguous() for bound in (key_begin, key_end))
    q, k, weights = q.contiguous(), k.contiguous(), weights.float().contiguous()
    budget = max(1, min(_SCORES_BYTES, budget_mb * 2**20 // (2 * torch.get_num_threads())))
    _call(
        "mla2dsa_lightning_indexer", q, k, weights, begin, end, out,
        batch, tokens, slots, heads, width, out.shape[2], budget, torch.get_num_threads(),
    )  # fmt: skip
    return out


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """As `reference.sparse_mla`, for bfloat16: [B,T,H,R]. Softmax in float32, its weights rounded to bfloat16 for the
    product with the values."""
    (batch, tokens, heads, width), slots, selected = q.shape, kv.shape[1], indices.shape[2]
    out = q.new_empty((batch, tokens, heads, kv_lora_rank))
    if out.numel() == 0:
        return out
    q, kv, indices = q.contiguous(), kv.contiguous(), indices.contiguous()
    _call(
        "mla2dsa_sparse_mla", q, kv, indices, out,
        batch, tokens, slots, heads, width, kv_lora_rank, selected, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _call(name: str, *arguments: Tensor | int | float) -> None:
    values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in arguments]
    if not getattr(library(), name)(*values):
        raise MemoryError(f"{name}: not enough memory for its buffers")
