"""Other ways to choose keys in a program with caches, in the place of its indexers: all of them, the oracle's, a window's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels import ops  # noqa: F401  (registers torch.ops.mla2dsa)
from ....kernels.reference import accumulation_dtype, in_range
from ..baselines import Choose, attend, oracle_keys, window_keys

INDEXER, ATTENTION = torch.ops.mla2dsa.lightning_indexer.default, torch.ops.mla2dsa.sparse_mla.default
VARIANTS = ("dense", "dsa", "oracle", "window")


def overrides(variant: str) -> dict[Any, Any]:
    """The ops that a session of this variant replaces; a layer's two follow one another, so the range of keys is handed on."""
    if variant == "dsa":
        return {}
    seen = _Ranges()
    if variant == "dense":
        return {INDEXER: seen.take, ATTENTION: seen.dense}
    choose: Mapping[str, Choose] = {"oracle": oracle_keys, "window": window_keys}
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
        """Attention to every key in range, by torch's fused kernel, which takes values as wide as keys: the latent is both. See
        `sparse_mla` for the shapes."""
        acc, last = accumulation_dtype(q.dtype), int(self.end.max())
        allowed = in_range(self.begin, self.end, last)  # [B,T,S]
        keys = kv[:, :last].to(acc).unsqueeze(1).expand(-1, q.shape[2], -1, -1)
        out = F.scaled_dot_product_attention(
            q.to(acc).transpose(1, 2), keys, keys, attn_mask=allowed.unsqueeze(1), scale=scale
        )
        latent = out[..., :kv_lora_rank].transpose(1, 2)  # [B,T,H,R]
        return latent.masked_fill(~allowed.any(-1)[:, :, None, None], 0.0).to(q.dtype)

    def sparse(self, choose: Choose, q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
        """Attention to the keys that `choose` gives."""
        last = int(self.end.max())
        keys, places = kv[:, :last], min(indices.shape[-1], last)
        return attend(choose, q, keys, self.begin, self.end, scale, kv_lora_rank, places)
