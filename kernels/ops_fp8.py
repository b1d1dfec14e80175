"""The float8 ops by name: `torch.ops.mla2dsa.quantize_fp8_rows`, `lightning_indexer_fp8`, `pack_latent_fp8`, `sparse_mla_fp8`.

Importing `ops` registers them too. As those they are functional, deterministic and not differentiable. CUDA tensors run
the Triton kernels, CPU tensors the reference. float8 is e4m3 (`torch.float8_e4m3fn`); letters as in `ops`.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import reference_fp8
from .choice import kernels_for
from .contracts import (
    ROW_BYTES,
    check_lightning_indexer_fp8,
    check_pack_latent_fp8,
    check_quantize_fp8_rows,
    check_sparse_mla_fp8,
)


@torch.library.custom_op("mla2dsa::quantize_fp8_rows", mutates_args=())
def quantize_fp8_rows(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """Rows of x [...,d] as e4m3 [...,d] with float32 scales [...]: x is about values * scale.

    scale = max |row| / 448, never below 2^-100; with `ue8m0` the next power of two (an exponent is all that is left of
    it, as DeepGEMM's UE8M0 scales are). values = row / scale in float32, rounded to nearest even; at most 448. A row
    that holds NaN or inf has a NaN or infinite scale.
    Raises ValueError naming the argument whose shape or dtype does not fit.
    """
    check_quantize_fp8_rows(x)
    values, scales = _kernels(x.device).quantize_fp8_rows(x, ue8m0)
    return values, scales


@quantize_fp8_rows.register_fake
def _quantize_fp8_rows_fake(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    check_quantize_fp8_rows(x)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("mla2dsa::lightning_indexer_fp8", mutates_args=())
def lightning_indexer_fp8(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int
) -> Tensor:
    """`lightning_indexer` of e4m3 q [B,T,HI,dI] and k [B,S,dI] with k_scale float32 [B,S] -> int32 [B,T,min(topk,S)].

    Score I[t,s] = k_scale[s] sum_h w[t,h] ReLU(q[t,h] . k[s]): the scales of q are already in `weights` (ReLU lets a
    positive factor through). On Hopper the products of a tensor core are summed with about 14 bits, so scores differ
    from the reference's by about 1e-4 of the largest product.
    Raises ValueError naming the argument whose shape, dtype or device does not fit, or a topk that is not positive.
    """
    check_lightning_indexer_fp8(q, k, k_scale, weights, key_begin, key_end, topk)
    out: Tensor = _kernels(q.device).lightning_indexer_fp8(q, k, k_scale, weights, key_begin, key_end, topk)
    return out


@lightning_indexer_fp8.register_fake
def _lightning_indexer_fp8_fake(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int
) -> Tensor:
    check_lightning_indexer_fp8(q, k, k_scale, weights, key_begin, key_end, topk)
    return q.new_empty((q.shape[0], q.shape[1], torch.sym_min(topk, k.shape[1])), dtype=torch.int32)


@torch.library.custom_op("mla2dsa::pack_latent_fp8", mutates_args=())
def pack_latent_fp8(kv: Tensor) -> Tensor:
    """Latent rows kv [B,S,512+64] -> uint8 [B,S,656], FlashMLA's layout of an fp8 cache.

    512 e4m3 | 4 float32 scales, one for each 128 channels (as in `quantize_fp8_rows`) | the 64 rotary channels as
    bfloat16. Raises ValueError naming the argument whose shape or dtype does not fit.
    """
    check_pack_latent_fp8(kv)
    out: Tensor = _kernels(kv.device).pack_latent_fp8(kv)
    return out


@pack_latent_fp8.register_fake
def _pack_latent_fp8_fake(kv: Tensor) -> Tensor:
    check_pack_latent_fp8(kv)
    return kv.new_empty((kv.shape[0], kv.shape[1], ROW_BYTES), dtype=torch.uint8)


@torch.library.custom_op("mla2dsa::sparse_mla_fp8", mutates_args=())
def sparse_mla_fp8(q: Tensor, kv_packed: Tensor, indices: Tensor, scale: float) -> Tensor:
    """`sparse_mla` over packed rows: q [B,T,H,576], kv_packed uint8 [B,S,656], indices int32 [B,T,K] -> [B,T,H,512].

    A row's latent channels are its e4m3 times their scale, not rounded to the dtype of q. kv_lora_rank is 512.
    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    check_sparse_mla_fp8(q, kv_packed, indices)
    out: Tensor = _kernels(q.device).sparse_mla_fp8(q, kv_packed, indices, scale)
    return out


@sparse_mla_fp8.register_fake
def _sparse_mla_fp8_fake(q: Tensor, kv_packed: Tensor, indices: Tensor, scale: float) -> Tensor:
    check_sparse_mla_fp8(q, kv_packed, indices)
    return q.new_empty((*q.shape[:-1], reference_fp8.LATENT))


def _kernels(device: torch.device) -> ModuleType:
    return kernels_for(device, reference_fp8, reference_fp8)
