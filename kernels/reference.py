"""The DSA ops in plain torch: the readable truth the fast kernels are tested against. No tiling, any device.

Letters: B batch, T queries, S key slots, HI index heads, dI index head width, H attention heads, R kv_lora_rank,
dr qk_rope_head_dim, K selected slots. Formulas: DeepSeek-V3.2-Exp report, equations 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lightning_indexer(q: Tensor, k: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int) -> Tensor:
    """I[t,s] = sum_h w[t,h] ReLU(q[t,h] . k[s]), then the topk best slots of each query's range. See `ops`."""
    return best_slots(index_scores(q, k, weights), key_begin, key_end, topk)


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """I [B,T,S] of all keys, in range or not; accumulated in float32, in float64 for float64 q."""
    acc = accumulation_dtype(q.dtype)
    keys = k.to(acc).transpose(1, 2).unsqueeze(1)  # [B,1,dI,S]
    heads = (q.to(acc) @ keys).relu()  # [B,T,HI,S]
    return (weights.to(acc).unsqueeze(2) @ heads).squeeze(2)  # [B,T,S]


def best_slots(scores: Tensor, key_begin: Tensor, key_end: Tensor, topk: int) -> Tensor:
    """The topk best of scores [B,T,S] within each range, ties to the lowest slot: int32 [B,T,min(topk,S)], ascending, then -1."""
    slots = scores.shape[2]
    scores = rankable(scores).masked_fill(~in_range(key_begin, key_end, slots), -torch.inf)  # [B,T,S]
    ranked = scores.sort(dim=-1, descending=True, stable=True)  # [B,T,S]; stable: ties to the lowest slot
    best, order = ranked.values[..., :topk], ranked.indices[..., :topk]  # [B,T,K]
    order = order.masked_fill(best == -torch.inf, slots).sort(dim=-1).values  # [B,T,K]; unused ones sort to the end
    return order.masked_fill(order == slots, -1).to(torch.int32)  # [B,T,K]


def sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    """Absorbed (MQA) attention of each query over its selected key rows. See `ops`."""
    acc = accumulation_dtype(q.dtype)
    valid = (indices >= 0) & (indices < kv.shape[1])  # [B,T,K]
    batch = torch.arange(kv.shape[0], device=kv.device)[:, None, None].expand_as(indices)  # [B,T,K]
    rows = q.new_zeros((*indices.shape, kv.shape[2]), dtype=acc)  # [B,T,K,R+dr]; ignored slots stay 0, never NaN
    rows[valid] = kv[batch[valid], indices[valid].long()].to(acc)
    logits = (q.to(acc) @ rows.transpose(2, 3)) * scale  # [B,T,H,K]
    logits = logits.masked_fill(~valid.unsqueeze(2), -torch.inf)  # [B,T,H,K]
    attention = softmax_or_zero(logits, valid.any(-1)[:, :, None, None])  # [B,T,H,K]
    return (attention @ rows[..., :kv_lora_rank]).to(q.dtype)  # [B,T,H,R]


def attention_mass(q: Tensor, kv: Tensor, key_begin: Tensor, key_end: Tensor, scale: float) -> Tensor:
    """Dense attention distribution of each query row, averaged over heads. See `ops`."""
    acc = accumulation_dtype(q.dtype)
    allowed = in_range(key_begin, key_end, kv.shape[1])  # [B,T,S]
    logits = (q.to(acc) @ kv.to(acc).transpose(1, 2).unsqueeze(1)) * scale  # [B,T,H,S]
    logits = logits.masked_fill(~allowed.unsqueeze(2), -torch.inf)  # [B,T,H,S]
    return softmax_or_zero(logits, allowed.any(-1)[:, :, None, None]).mean(2)  # [B,T,S]


def cache_write(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """The cache with new rows at their slots. See `ops`."""
    out = cache.clone(memory_format=torch.contiguous_format)  # [B,C,d]
    inside = (slots >= 0) & (slots < cache.shape[1])  # [B,T]
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None].expand_as(slots)  # [B,T]
    out[batch[inside], slots[inside].long()] = new[inside].to(cache.dtype)
    return out


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_range(key_begin: Tensor, key_end: Tensor, slots: int) -> Tensor:
    """Bool [B,T,S]: slot s is inside [key_begin, key_end). Bounds outside [0, S] act as if clamped."""
    slot = torch.arange(slots, device=key_begin.device)
    return (slot >= key_begin.unsqueeze(-1)) & (slot < key_end.unsqueeze(-1))


def rankable(scores: Tensor) -> Tensor:
    """NaN and -inf become the lowest finite number: last in rank, still above the -inf of keys that do not compete."""
    lowest = torch.finfo(scores.dtype).min
    return scores.nan_to_num(nan=lowest, posinf=torch.inf, neginf=lowest)


def softmax_or_zero(logits: Tensor, has_key: Tensor) -> Tensor:
    """Softmax over the last dim; rows where `has_key` is False (all logits -inf) give 0 instead of NaN."""
    return logits.softmax(-1).masked_fill(~has_key, 0)
