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


# (q rows, kv, first key and end of the keys of each [B, t], scale, places) -> keys of a tile of queries [B, t, places], -1 for none
Choose = Callable[[Tensor, Tensor, Tensor, Tensor, float, int], Tensor]


def attend(
    choose: Choose, q: Tensor, kv: Tensor, begin: Tensor, end: Tensor, scale: float, kv_lora_rank: int, places: int
) -> Tensor:
    """Attention over the keys that `choose` gives, of those from `begin` to `end` [B, T]. See `sparse_mla` for the shapes."""
    chosen = torch.empty(*q.shape[:2], places, dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[1], QUERY_ROWS):
        rows = slice(start, start + QUERY_ROWS)
        chosen[:, rows] = choose(q[:, rows], kv, begin[:, rows], end[:, rows], scale, places).to(torch.int32)
    out: Tensor = torch.ops.mla2dsa.sparse_mla(q, kv, chosen, scale, kv_lora_rank)
    return out


def oracle_keys(q: Tensor, kv: Tensor, begin: Tensor, end: Tensor, scale: float, places: int) -> Tensor:
    """Those with the most head-mean dense attention: no single set per query can capture more."""
    best = torch.ops.mla2dsa.attention_mass(q, kv, begin, end, scale).topk(places, dim=-1)
    chosen: Tensor = best.indices.masked_fill(best.values <= 0, -1)
    return chosen


def window_keys(q: Tensor, kv: Tensor, begin: Tensor, end: Tensor, scale: float, places: int) -> Tensor:
    """The first SINKS in range and the most recent ones, `places` in all."""
    first = min(SINKS, places)
    sinks = begin[..., None] + torch.arange(first, device=q.device)
    recent = end[..., None] - 1 - torch.arange(places - first, device=q.device)
    sinks = sinks.masked_fill(sinks >= end[..., None], -1)
    return torch.cat([sinks, recent.masked_fill(recent < begin[..., None] + first, -1)], -1)


def _causal(choose: Choose, q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """In the place of `sparse_mla` in a program without caches or padding: every query sees the keys up to its own. The queries may be
    a tile of them, the last of the keys."""
    end = torch.arange(kv.shape[1] - q.shape[1] + 1, kv.shape[1] + 1, device=q.device).expand(q.shape[:2])
    places = min(indices.shape[-1], kv.shape[1])
    return attend(choose, q, kv, torch.zeros_like(end), end, scale, kv_lora_rank, places)


def oracle(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """`oracle_keys` in the place of the indexer's."""
    return _causal(oracle_keys, q, kv, indices, scale, kv_lora_rank)


def window(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """`window_keys` in the place of the indexer's."""
    return _causal(window_keys, q, kv, indices, scale, kv_lora_rank)


def chance(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """index_topk past keys drawn at random (seeded by the length)."""
    generator = torch.Generator(device=q.device).manual_seed(kv.shape[1])

    def drawn(q: Tensor, kv: Tensor, begin: Tensor, end: Tensor, scale: float, places: int) -> Tensor:
        noise = torch.rand(*end.shape, kv.shape[1], generator=generator, device=q.device)
        noise = noise.masked_fill(torch.arange(kv.shape[1], device=q.device) >= end[..., None], -1.0)
        best = noise.topk(places, dim=-1)
        return best.indices.masked_fill(best.values < 0, -1)

    return _causal(drawn, q, kv, indices, scale, kv_lora_rank)
