"""The float8 ops in plain torch: quantised rows, an indexer over them, and sparse MLA over a packed latent cache.

float8 is e4m3 (`torch.float8_e4m3fn`, largest number 448). A packed latent row is FlashMLA's for an fp8 cache, 656 bytes:
512 e4m3 | 4 float32 scales, one per 128 channels | 64 bfloat16 (the rotary channels, which are not quantised).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import accumulation_dtype, best_slots, index_scores, sparse_mla

LATENT, GROUPS, ROPE, ROW_BYTES = 512, 4, 64, 656
LARGEST = 448.0
_SMALLEST_SCALE = 2.0**-100  # so that a row of zeros divides by something


def quantize_fp8_rows(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """See `ops_fp8`."""
    values = x.float()
    scale = values.abs().amax(-1).div(LARGEST).clamp(min=_SMALLEST_SCALE)  # [...], NaN stays NaN
    if ue8m0:
        scale = next_power_of_two(scale)
    return (values / scale.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def next_power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below each positive normal float32; inf and NaN as they are."""
    bits = scale.view(torch.int32)
    return torch.where(bits < 0x7F800000, (bits + 0x7FFFFF) & 0x7F800000, bits).view(torch.float32)


def lightning_indexer_fp8(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int
) -> Tensor:
    """See `ops_fp8`."""
    scores = index_scores(q.float(), k.float(), weights) * k_scale.unsqueeze(1)  # [B,T,S]
    return best_slots(scores, key_begin, key_end, topk)


def pack_latent_fp8(kv: Tensor) -> Tensor:
    """See `ops_fp8`."""
    latent = kv[..., :LATENT].unflatten(-1, (GROUPS, -1))  # [B,S,4,128]
    codes, scales = quantize_fp8_rows(latent, False)
    rope = kv[..., LATENT:].to(torch.bfloat16).contiguous()
    return torch.cat((codes.flatten(-2).view(torch.uint8), scales.view(torch.uint8), rope.view(torch.uint8)), -1)


def unpack_latent_fp8(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B,S,656] -> [B,S,576] in `dtype`; products in float32, or float64 if that is asked for."""
    acc = accumulation_dtype(dtype)
    codes = packed[..., :LATENT].contiguous().view(torch.float8_e4m3fn).to(acc).unflatten(-1, (GROUPS, -1))
    scales = packed[..., LATENT : LATENT + 4 * GROUPS].contiguous().view(torch.float32).to(acc)  # [B,S,4]
    rope = packed[..., LATENT + 4 * GROUPS :].contiguous().view(torch.bfloat16)  # [B,S,64]
    return torch.cat(((codes * scales.unsqueeze(-1)).flatten(-2).to(dtype), rope.to(dtype)), -1)


def sparse_mla_fp8(q: Tensor, kv_packed: Tensor, indices: Tensor, scale: float) -> Tensor:
    """See `ops_fp8`."""
    rows = unpack_latent_fp8(kv_packed, accumulation_dtype(q.dtype))
    return sparse_mla(q, rows, indices, scale, LATENT)
