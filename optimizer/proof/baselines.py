"""What an indexer is measured against: the best selection there is, a sliding window, and chance.

Each replaces the `sparse_mla` op of a converted program, so that everything else stays the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import ops  # noqa: F401  (registers torch.ops.mla2dsa)
from ..indexer.indexer_math import SINKS

# benchmarks/memory.py --rows: 512 to 2048 take about the same time, fewer take longer; at 32K keys a tile's mass has 64 MiB.
QUERY_ROWS = 512


def _attended(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int, choose: Callable[[slice, Tensor], Tensor]
) -> Tensor:
    """Attention over the keys that `choose` gives for a tile of queries, whose key ranges end at [B, t]: [B, t, K]."""
    tokens = q.shape[1]
    chosen = torch.empty_like(indices, dtype=torch.int32)
    for start in range(0, tokens, QUERY_ROWS):
        rows = slice(start, min(start + QUERY_ROWS, tokens))
        end = torch.arange(rows.start + 1, rows.stop + 1, device=q.device).expand(q.shape[0], -1)
        chosen[:, rows] = choose(rows, end).to(torch.int32)
    out: Tensor = torch.ops.mla2dsa.sparse_mla(q, kv, chosen, scale, kv_lora_rank)
    return out


def oracle(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """The keys with the most head-mean dense attention: no single set per query can capture more."""

    def choose(rows: slice, end: Tensor) -> Tensor:
        mass = torch.ops.mla2dsa.attention_mass(q[:, rows], kv, torch.zeros_like(end), end, scale)
        best = mass.topk(indices.shape[-1], dim=-1)
        chosen: Tensor = best.indices.masked_fill(best.values <= 0, -1)
        return chosen

    return _attended(q, kv, indices, scale, kv_lora_rank, choose)


def window(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """The most recent keys and the first SINKS, index_topk in all."""
    count = indices.shape[-1]
    first = min(SINKS, count)

    def choose(rows: slice, end: Tensor) -> Tensor:
        recent = end[..., None] - 1 - torch.arange(count - first, device=q.device)
        sinks = torch.arange(first, device=q.device).expand(*end.shape, first)
        return torch.cat([sinks.masked_fill(sinks >= end[..., None], -1), recent.masked_fill(recent < first, -1)], -1)

    return _attended(q, kv, indices, scale, kv_lora_rank, choose)


def chance(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """index_topk past keys drawn at random (seeded by the length)."""
    generator = torch.Generator(device=q.device).manual_seed(kv.shape[1])

    def choose(rows: slice, end: Tensor) -> Tensor:
        noise = torch.rand(*end.shape, kv.shape[1], generator=generator, device=q.device)
        noise = noise.masked_fill(torch.arange(kv.shape[1], device=q.device) >= end[..., None], -1.0)
        best = noise.topk(indices.shape[-1], dim=-1)
        return best.indices.masked_fill(best.values < 0, -1)

    return _attended(q, kv, indices, scale, kv_lora_rank, choose)
