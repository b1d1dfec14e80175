"""The DSA ops by name: `torch.ops.mla2dsa.lightning_indexer`, `sparse_mla`, `attention_mass`, `cache_write`, and the capture anchors.

Importing this module registers all of them, each with a fake that keeps dynamic dims dynamic under torch.export.
All are functional, deterministic, and not differentiable. Letters: B batch, T queries, S key slots, H heads, R
kv_lora_rank, dr qk_rope_head_dim, HI and dI the indexer's heads and head width.

CPU tensors run `cpu`, CUDA tensors the Triton kernels (`gpu.dispatch`; float64 the reference), others `reference`.
MLA2DSA_KERNELS=reference forces the reference everywhere; MLA2DSA_KERNELS=triton runs the Triton kernels on CPU tensors
too, in an interpreter: for tests.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import anchors as anchors  # registers the capture anchors
from . import cpu, reference
from . import delta_attention as delta_attention  # registers hybrids' linear attention
from . import ops_fp8 as ops_fp8  # registers the float8 ops
from .choice import KERNELS_ENV as KERNELS_ENV
from .choice import kernels_for
from .contracts import check_attention_mass, check_cache_write, check_lightning_indexer, check_sparse_mla
from .op_spec import CACHE_WRITE, LIGHTNING_INDEXER, SPARSE_MLA, OpSpec


def _declared(spec: OpSpec, check: Callable[..., None]) -> Callable[[Callable[..., Tensor]], Any]:
    """Registers a function as the op that `spec` declares, with a fake that runs the same check."""

    def register(function: Callable[..., Tensor]) -> Any:
        op = torch.library.custom_op(f"mla2dsa::{spec.name}", function, mutates_args=(), schema=spec.torch_schema())

        def fake(*arguments: Any) -> Tensor:
            check(*arguments)
            tensors, attributes = arguments[: len(spec.inputs)], arguments[len(spec.inputs) :]
            sizes: dict[str, Any] = spec.sizes([tensor.shape for tensor in tensors])
            sizes |= {name: value for (name, _), value in zip(spec.attributes, attributes, strict=True)}
            model = spec.output_input()
            dtype = torch.int32 if model is None else tensors[model].dtype
            out: Tensor = tensors[0].new_empty(spec.output_shape(sizes, torch.sym_min), dtype=dtype)
            return out

        op.register_fake(fake)
        return op

    return register


@_declared(LIGHTNING_INDEXER, check_lightning_indexer)
def lightning_indexer(q: Tensor, k: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int) -> Tensor:
    """The slots each query attends to: q [B,T,HI,dI], k [B,S,dI], weights [B,T,HI] -> int32 [B,T,min(topk,S)].

    Score I[t,s] = sum_h w[t,h] ReLU(q[t,h] . k[s]) (DeepSeek-V3.2-Exp report, equation 1); constant factors are
    already in `weights`, which may be negative. Accumulated in float32, in float64 for float64 inputs.
    key_begin, key_end [B,T] int32 or int64: keys outside the half-open range never compete.

    Exact: a row holds min(topk, keys in its range) slots, the best scores, ties to the lowest slot. Order: slots
    ascending, then -1. A NaN or -inf score ranks last, as the lowest finite number would; it still competes.
    Raises ValueError naming the argument whose shape, dtype or device does not fit, or a topk that is not positive.
    """
    check_lightning_indexer(q, k, weights, key_begin, key_end, topk)
    out: Tensor = _kernels(q.device).lightning_indexer(q, k, weights, key_begin, key_end, topk)
    return out


@_declared(SPARSE_MLA, check_sparse_mla)
def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """Absorbed MLA over selected keys: q [B,T,H,R+dr], kv [B,S,R+dr], indices int32 [B,T,K] -> [B,T,H,R].

    out = sum_s softmax_s(scale * q . kv[s]) kv[s, :R] over the slots in `indices` (DeepSeek-V3.2-Exp report,
    equation 2, in MQA form). Slots outside [0, S), -1 among them, are ignored wherever they stand; a row without
    any gives 0. A slot listed twice counts twice. Softmax and sums in float32 (float64 for float64 inputs).
    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    check_sparse_mla(q, kv, indices, scale, kv_lora_rank)
    out: Tensor = _kernels(q.device).sparse_mla(q, kv, indices, scale, kv_lora_rank)
    return out


@torch.library.custom_op("mla2dsa::attention_mass", mutates_args=())
def attention_mass(q: Tensor, kv: Tensor, key_begin: Tensor, key_end: Tensor, scale: float) -> Tensor:
    """Where dense attention looks: absorbed query rows q [B,R,H,d], kv [B,S,d] -> float32 [B,R,S] (float64 if q is).

    Softmax of scale * q . kv over the keys in [key_begin, key_end) ([B,R], int32 or int64), averaged over heads; 0
    outside the range, so a row sums to 1, or to 0 when its range is empty. The target the indexer is distilled from
    (DeepSeek-V3.2-Exp report, equation 3).
    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    check_attention_mass(q, kv, key_begin, key_end)
    out: Tensor = _kernels(q.device).attention_mass(q, kv, key_begin, key_end, scale)
    return out


@attention_mass.register_fake
def _attention_mass_fake(q: Tensor, kv: Tensor, key_begin: Tensor, key_end: Tensor, scale: float) -> Tensor:
    check_attention_mass(q, kv, key_begin, key_end)
    return q.new_empty((q.shape[0], q.shape[1], kv.shape[1]), dtype=reference.accumulation_dtype(q.dtype))


@_declared(CACHE_WRITE, check_cache_write)
def cache_write(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """A copy of `cache` [B,C,d] with row slots[b,t] of sequence b replaced by new[b,t]: new [B,T,d], slots [B,T].

    slots: int32 or int64. A slot outside [0, C) is not written. When a slot comes twice in a sequence its rows must be
    equal (right padding repeats the last token), otherwise which one stays is unspecified. dtype of `cache`.
    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    check_cache_write(cache, new, slots)
    out: Tensor = _kernels(cache.device).cache_write(cache, new, slots)
    return out


def _kernels(device: torch.device) -> ModuleType:
    """The module whose functions serve this device."""
    return kernels_for(device, cpu, reference)
