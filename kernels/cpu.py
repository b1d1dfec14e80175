"""The DSA ops on CPU tensors: the same results as `reference`, in bounded memory and a fraction of the time.

What makes them fast: one GEMM over the keys for a tile of queries, a partial sort of the scores without their
indices, and a gather small enough to stay in cache. Where the machine has bfloat16 GEMMs they are used, but never
believed: what their rounding leaves open (the low half of a logit, a close call in the ranking) is computed again.
bfloat16 and float32 are left to the C++ of `native_ops` where it can be had; what is here serves the other types, and
machines without a compiler.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..compat.torch_private import cpu_multiplies_bfloat16
from . import native_ops
from .reference import accumulation_dtype, in_range, rankable, softmax_or_zero
from .reference import cache_write as cache_write  # indexed assignment is as fast as it gets

BUDGET_MB = 64  # memory an op may use beyond its inputs, its output and one upcast copy of a sequence's keys
_INDEX_ROWS = 32  # queries scored at once: more do not make the GEMM faster
_SLACK = 2.0**-8  # of sum |w| ReLU(q.k): bounds the rounding of the products to bfloat16, twice over
_DOTS_BYTES = 2 * 2**20  # q.k products in flight: stay in the last cache level until they are summed over the heads
_GATHER_BYTES = 2**20  # gathered key rows in flight: a few tokens when topk is small, else one token, whatever it takes


def lightning_indexer(
    q: Tensor, k: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int, budget_mb: int = BUDGET_MB
) -> Tensor:
    """As `reference.lightning_indexer`: int32 [B,T,min(topk,S)]."""
    if (path := native_ops.taken(q.dtype)) != native_ops.TORCH:
        return native_ops.lightning_indexer(path, q, k, weights, key_begin, key_end, topk, budget_mb)
    slots = k.shape[1]
    out = q.new_full((q.shape[0], q.shape[1], min(topk, slots)), -1, dtype=torch.int32)
    begin, end = key_begin.clamp(0, slots).long(), key_end.clamp(0, slots).long()  # [B,T]
    rows = index_rows(slots, budget_mb)
    for b, tile in _tiles(q.shape[0], q.shape[1], rows):
        _index_tile(q[b, tile], k[b], weights[b, tile], begin[b, tile], end[b, tile], out[b, tile])
    return out


def sparse_mla(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int, budget_mb: int = BUDGET_MB
) -> Tensor:
    """As `reference.sparse_mla`: [B,T,H,R] in the dtype of q."""
    if (path := native_ops.taken(q.dtype)) != native_ops.TORCH:
        return native_ops.sparse_mla(path, q, kv, indices, scale, kv_lora_rank)
    out = q.new_zeros((*q.shape[:3], kv_lora_rank))
    valid = (indices >= 0) & (indices < kv.shape[1])
    rows = gather_rows(indices.shape[2], kv.shape[2] * kv.element_size(), q.shape[2], budget_mb)
    scratch = kv.new_empty((min(rows, q.shape[1]) * indices.shape[2], kv.shape[2]))  # one for all tiles: no page faults
    for b, tile in _tiles(q.shape[0], q.shape[1], rows):
        picked, usable = _pack(indices[b, tile], valid[b, tile])  # [t,K'] both
        if picked.numel():
            keys = torch.index_select(kv[b], 0, picked.flatten(), out=scratch[: picked.numel()])
            out[b, tile] = _attend(q[b, tile], keys.view(*picked.shape, -1), usable, scale, kv_lora_rank)
    return out


def attention_mass(
    q: Tensor, kv: Tensor, key_begin: Tensor, key_end: Tensor, scale: float, budget_mb: int = BUDGET_MB
) -> Tensor:
    """As `reference.attention_mass`: [B,R,S] in float32, or float64."""
    acc, slots = accumulation_dtype(q.dtype), kv.shape[1]
    out = q.new_empty((q.shape[0], q.shape[1], slots), dtype=acc)
    rows = mass_rows(slots, q.shape[2], budget_mb)
    for b, tile in _tiles(q.shape[0], q.shape[1], rows):
        if tile.start == 0:
            keys = kv[b].to(acc).T  # [d,S]
        allowed = in_range(key_begin[b, tile], key_end[b, tile], slots)  # [t,S]
        logits = (q[b, tile].to(acc) @ keys).mul_(scale)  # [t,H,S]
        logits.masked_fill_(~allowed.unsqueeze(1), -torch.inf)
        out[b, tile] = softmax_or_zero(logits, allowed.any(-1)[:, None, None]).mean(1)
    return out


def index_rows(slots: int, budget_mb: int) -> int:
    """Queries per tile of the indexer: scores, their sorted copy, masks and counts are 48 bytes per query and slot."""
    return max(1, min(_INDEX_ROWS, budget_mb * 2**20 // (48 * max(1, slots))))


def gather_rows(topk: int, row_bytes: int, heads: int, budget_mb: int) -> int:
    """Tokens per tile of the sparse attention: the gathered rows stay in cache, the logits in the budget."""
    in_cache = _GATHER_BYTES // max(1, topk * row_bytes)
    return max(1, min(in_cache, budget_mb * 2**20 // max(1, 16 * heads * topk)))


def mass_rows(slots: int, heads: int, budget_mb: int) -> int:
    """Query rows per tile of the attention mass: logits, probabilities and a masked copy in float64 fit the budget."""
    return max(1, budget_mb * 2**20 // max(1, 24 * heads * slots))


def _tiles(batch: int, queries: int, rows: int) -> Iterator[tuple[int, slice]]:
    return ((b, slice(t, min(t + rows, queries))) for b in range(batch) for t in range(0, queries, rows))


def _index_tile(q: Tensor, k: Tensor, weights: Tensor, begin: Tensor, end: Tensor, out: Tensor) -> None:
    """Fill out [t,K] for q [t,HI,dI], k [S,dI], weights [t,HI], begin and end [t] in [0, S]."""
    kept = out.shape[1]
    if bool((end - begin <= kept).all()):  # every key in range is selected: nothing to rank
        slot = begin[:, None] + torch.arange(kept)
        out.copy_(slot.masked_fill_(slot >= end[:, None], -1))
        return
    low, high = int(begin.min()), int(end.max())
    allowed = in_range(begin - low, end - low, high - low)  # [t,S']
    chosen = _choose(_ranking(q, k[low:high], weights, allowed, kept), kept)  # [t,S']
    used = torch.arange(kept) < chosen.sum(-1, keepdim=True)  # [t,K]
    out.masked_scatter_(used, chosen.nonzero()[:, 1].add_(low).to(torch.int32))


def _choose(scores: Tensor, kept: int) -> Tensor:
    """Bool [t,S]: the `kept` best scores of each row above -inf, ties to the lowest slot."""
    threshold = _kth_largest(scores, kept)  # [t,1]
    chosen = scores >= threshold
    crowded = chosen.sum(-1) > kept  # more ties at the threshold than places left
    if crowded.any():
        over, tied = scores[crowded] > threshold[crowded], scores[crowded] == threshold[crowded]
        chosen[crowded] = over | (tied & (tied.cumsum(-1) <= kept - over.sum(-1, keepdim=True)))
    return chosen


def _kth_largest(scores: Tensor, kept: int) -> Tensor:
    """[t,1]; the lowest finite number where fewer than `kept` scores are above -inf. numpy's partition is vectorised:
    on 16K scores it takes a thirteenth of torch.topk's time."""
    nth = scores.shape[1] - kept
    ordered = scores.clone()
    ordered.numpy().partition(nth, axis=-1)
    return ordered[:, nth, None].clamp(min=torch.finfo(scores.dtype).min)


def _ranking(q: Tensor, k: Tensor, weights: Tensor, allowed: Tensor, kept: int) -> Tensor:
    """Scores [t,S] whose `kept` best, ties included, are those of the exact scores; -inf where not allowed."""
    if has_bfloat16_gemm(q.dtype):
        coarse, size = _scores(q, k, torch.stack((weights, weights.abs()), 1), q.dtype).unbind(1)
        if bool(size.isfinite().all()):
            return _settle(q, k, weights, coarse.masked_fill(~allowed, -torch.inf), size * _SLACK, kept)
    exact = _scores(q, k, weights.unsqueeze(1), accumulation_dtype(q.dtype)).squeeze(1)
    return rankable(exact).masked_fill_(~allowed, -torch.inf)


def _scores(q: Tensor, k: Tensor, weights: Tensor, compute: torch.dtype) -> Tensor:
    """sum_h weights[t,n,h] ReLU(q[t,h] . k[s]) -> [t,n,S], a block of keys at a time. The products are rounded to
    `compute`, the sum over heads is float32, float64 for float64."""
    rows, heads, _ = q.shape
    acc = accumulation_dtype(q.dtype)
    weights, queries = weights.to(acc), q.to(compute).flatten(0, 1)  # [t,n,HI], [t*HI,dI]
    out = q.new_empty((rows, weights.shape[1], k.shape[0]), dtype=acc)
    upcast = k.shape[1] if k.dtype != compute else 0
    step = max(1, _DOTS_BYTES // (acc.itemsize * max(1, rows * heads, upcast)))
    for s in range(0, k.shape[0], step):
        dots = (queries @ k[s : s + step].to(compute).T).relu_()  # [t*HI,s]
        out[..., s : s + step] = torch.bmm(weights, dots.to(acc).view(rows, heads, -1))
    return out


def _settle(q: Tensor, k: Tensor, weights: Tensor, coarse: Tensor, slack: Tensor, kept: int) -> Tensor:
    """`coarse` [t,S], given |exact - coarse| <= slack, with the exact score wherever it decides. The exact threshold
    lies between the thresholds of the lower and the upper bounds: a key beyond both needs no second look."""
    floor, ceiling = coarse - slack, coarse + slack
    contested = (ceiling >= _kth_largest(floor, kept)) & (floor <= _kth_largest(ceiling, kept))
    for row in range(len(q)):
        slot, one = contested[row].nonzero().flatten(), slice(row, row + 1)
        exact = _scores(q[one], k.index_select(0, slot), weights[one, None], coarse.dtype)
        coarse[row].index_copy_(0, slot, exact.flatten())
    return coarse


def _pack(indices: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Slots [t,K'] with the valid ones first, K' the most any row has, and which are valid (None: all are)."""
    if valid.all():
        return indices, None
    counts = valid.sum(-1, keepdim=True)  # [t,1]
    width = int(counts.max())
    order = (~valid).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]  # [t,K']
    usable = torch.arange(width) < counts
    return indices.gather(1, order).masked_fill_(~usable, 0), None if usable.all() else usable


def _attend(q: Tensor, rows: Tensor, usable: Tensor | None, scale: float, kv_lora_rank: int) -> Tensor:
    """[t,H,R] for q [t,H,R+dr] over its own key rows [t,K,R+dr]; usable bool [t,K], None if all are."""
    if not has_bfloat16_gemm(q.dtype):
        acc = accumulation_dtype(q.dtype)
        q, rows = q.to(acc), rows.to(acc)
    if len(q) == 1:  # a batched bfloat16 GEMM first copies a transposed operand, a plain one does not
        q, rows = q[0], rows[0]
    logits = _product(q, rows.mT).mul_(scale)  # [t,H,K]
    if usable is None:
        attention = logits.softmax(-1)
    else:
        rows.masked_fill_(~usable.unsqueeze(-1), 0)  # a filler row may hold NaN, and 0 * NaN is NaN
        logits.masked_fill_(~usable.unsqueeze(1), -torch.inf)
        attention = softmax_or_zero(logits, usable.any(-1)[:, None, None])
    return attention.to(q.dtype) @ rows[..., :kv_lora_rank]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, float64 for float64; both 2-D or both batched.

    A bfloat16 GEMM rounds its float32 sums to 8 bits. What that drops is the result of the same GEMM started at
    minus the rounded product, so two of them give 16 bits, in half the time of one in float32.
    """
    if has_bfloat16_gemm(a.dtype):
        high = a @ b
        add_product = torch.addmm if a.ndim == 2 else torch.baddbmm
        return add_product(high, a, b, beta=-1).float().add_(high)
    acc = accumulation_dtype(a.dtype)
    return a.to(acc) @ b.to(acc)


def has_bfloat16_gemm(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype are bfloat16 and this machine multiplies them faster than float32."""
    if dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return cpu_multiplies_bfloat16()
