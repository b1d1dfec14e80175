"""Other ways to choose keys in a program with caches, in the place of its indexers: all of them, the oracle's, a window's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ....kernels import ops  # noqa: F401  (registers torch.ops.mla2dsa)
from ....kernels.reference import accumulation_dtype, in_range, softmax_or_zero
from ...indexer.indexer_math import BLOCK_ELEMENTS, SINKS
from ..baselines import QUERY_ROWS

INDEXER, ATTENTION = torch.ops.mla2dsa.lightning_indexer.default, torch.ops.mla2dsa.sparse_mla.default
VARIANTS = ("dense", "dsa", "oracle", "window")

# (q rows, latent rows, begin, end, scale, places) -> slots of a tile of queries [B, t, places], -1 where there is none
Choose = Callable[[Tensor, Tensor, Tensor, Tensor, float, int], Tensor]


def overrides(variant: str) -> dict[Any, Any]:
    """The ops that a session of this variant replaces; a layer's two follow one another, so the range of keys is handed on."""
    if variant == "dsa":
        return {}
    seen = _Ranges()
    if variant == "dense":
        return {INDEXER: seen.take, ATTENTION: seen.dense}
    choose: Mapping[str, Choose] = {"oracle": _oracle, "window": _window}
    rule = choose[variant]
    return {INDEXER: seen.take, ATTENTION: lambda *args: seen.sparse(rule, *args)}


class _Ranges:
    """Which keys the queries of the layer at hand may see."""

    def __init__(self) -> None:
        self.begin = self.end = torch.empty(0)

    def take(self, q: Tensor, k: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int) -> Tensor:
        """In the place of the indexer: no keys yet, as many places as it would fill."""
        self.begin, self.end = key_begin, key_end
        return torch.empty(*q.shape[:2], min(topk, k.shape[1]), dtype=torch.int32, device=q.device)

    def dense(self, q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
        """Attention to every key in range, in tiles of queries. See `sparse_mla` for the shapes."""
        acc, last = accumulation_dtype(q.dtype), int(self.end.max())
        keys = kv[:, :last].to(acc).unsqueeze(1)  # [B,1,S,R+dr]
        step = max(1, BLOCK_ELEMENTS // (q.shape[0] * q.shape[2] * last))
        parts = []
        for start in range(0, q.shape[1], step):
            rows = slice(start, start + step)
            allowed = in_range(self.begin[:, rows], self.end[:, rows], last)  # [B,t,S]
            logits = (q[:, rows].to(acc) @ keys.transpose(2, 3)) * scale  # [B,t,H,S]
            logits = logits.masked_fill_(~allowed.unsqueeze(2), -torch.inf)
            weights = softmax_or_zero(logits, allowed.any(-1)[:, :, None, None])
            parts.append((weights @ keys[..., :kv_lora_rank]).to(q.dtype))
        return torch.cat(parts, 1)

    def sparse(self, choose: Choose, q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
        """Attention to the keys that `choose` gives."""
        last = int(self.end.max())
        places = min(indices.shape[-1], last)
        chosen = torch.empty(*q.shape[:2], places, dtype=torch.int32, device=q.device)
        for start in range(0, q.shape[1], QUERY_ROWS):
            rows = slice(start, start + QUERY_ROWS)
            tile = (q[:, rows], kv[:, :last], self.begin[:, rows], self.end[:, rows])
            chosen[:, rows] = choose(*tile, scale, places).to(torch.int32)
        out: Tensor = torch.ops.mla2dsa.sparse_mla(q, kv, chosen, scale, kv_lora_rank)
        return out


def _oracle(q: Tensor, kv: Tensor, begin: Tensor, end: Tensor, scale: float, places: int) -> Tensor:
    """Those with the most head-mean dense attention."""
    best = torch.ops.mla2dsa.attention_mass(q, kv, begin, end, scale).topk(places, dim=-1)
    chosen: Tensor = best.indices.masked_fill(best.values <= 0, -1)
    return chosen


def _window(q: Tensor, kv: Tensor, begin: Tensor, end: Tensor, scale: float, places: int) -> Tensor:
    """The first SINKS in range and the most recent ones."""
    first = min(SINKS, places)
    sinks = begin[..., None] + torch.arange(first, device=q.device)
    recent = end[..., None] - 1 - torch.arange(places - first, device=q.device)
    sinks = sinks.masked_fill(sinks >= end[..., None], -1)
    return torch.cat([sinks, recent.masked_fill(recent < begin[..., None] + first, -1)], -1)
