"""What an indexer is measured against: the best selection there is, a sliding window, and chance.

Each replaces the `sparse_mla` op of a converted program, so that everything else stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import ops  # noqa: F401  (registers torch.ops.mla2dsa)
from ..indexer.indexer_math import SINKS


def _ranges(q: Tensor) -> tuple[Tensor, Tensor]:
    """Causal key ranges [B, T] of unpadded sequences."""
    batch, tokens = q.shape[:2]
    end = torch.arange(1, tokens + 1, device=q.device).expand(batch, -1)
    return torch.zeros_like(end), end


def oracle(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """The keys with the most head-mean dense attention: no single set per query can capture more."""
    begin, end = _ranges(q)
    mass = torch.ops.mla2dsa.attention_mass(q, kv, begin, end, scale)
    best = mass.topk(indices.shape[-1], dim=-1)
    chosen = best.indices.masked_fill(best.values <= 0, -1).to(torch.int32)
    out: Tensor = torch.ops.mla2dsa.sparse_mla(q, kv, chosen, scale, kv_lora_rank)
    return out


def window(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """The most recent keys and the first SINKS, index_topk in all."""
    _, end = _ranges(q)
    count = indices.shape[-1]
    first = min(SINKS, count)
    recent = end[..., None] - 1 - torch.arange(count - first, device=q.device)
    sinks = torch.arange(first, device=q.device).expand(*end.shape, first)
    recent = recent.masked_fill(recent < first, -1)
    chosen = torch.cat([sinks.masked_fill(sinks >= end[..., None], -1), recent], -1).to(torch.int32)
    out: Tensor = torch.ops.mla2dsa.sparse_mla(q, kv, chosen, scale, kv_lora_rank)
    return out


def chance(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """index_topk past keys drawn at random (seeded by the length)."""
    _, end = _ranges(q)
    generator = torch.Generator(device=q.device).manual_seed(kv.shape[1])
    noise = torch.rand(*end.shape, kv.shape[1], generator=generator, device=q.device)
    noise = noise.masked_fill(torch.arange(kv.shape[1], device=q.device) >= end[..., None], -1.0)
    best = noise.topk(indices.shape[-1], dim=-1)
    chosen = best.indices.masked_fill(best.values < 0, -1).to(torch.int32)
    out: Tensor = torch.ops.mla2dsa.sparse_mla(q, kv, chosen, scale, kv_lora_rank)
    return out
