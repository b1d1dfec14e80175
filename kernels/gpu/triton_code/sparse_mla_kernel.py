"""Attention of each query over the key rows it selected, in absorbed (MQA) form: one key row serves all heads.

A program takes one query and a block of heads, walks over the selected slots and keeps a running softmax. For few
queries the slots of one query are split between programs, which leave partial sums for `combine_kernel`. Rows of slots
that are not valid are never read: their lanes are masked.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def query_heads(
    q, head, HEADS: tl.constexpr, ROW: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr
):
    """Channels FIRST .. FIRST + WIDTH of heads of one query [HEADS,ROW], zeros beyond: [heads,WIDTH_P]."""
    channel = tl.arange(0, WIDTH_P)
    mask = (head < HEADS)[:, None] & (channel < WIDTH)[None, :]
    return tl.load(q + head[:, None] * ROW + FIRST + channel[None, :], mask=mask, other=0.0)


@triton.jit
def selected(indices, first, stop, S, BLOCK_K: tl.constexpr):
    """Slots `first` .. first + BLOCK_K of a query's selection, and which of them exist."""
    i = first + tl.arange(0, BLOCK_K)
    slot = tl.load(indices + i, mask=i < stop, other=-1)
    return slot.to(tl.int64), (slot >= 0) & (slot < S)


@triton.jit
def key_rows(kv, slot, valid, ROW: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr):
    """Channels FIRST .. FIRST + WIDTH of key rows, zeros where a row is not valid and beyond WIDTH."""
    channel = tl.arange(0, WIDTH_P)
    mask = valid[:, None]
    if WIDTH_P > WIDTH:
        mask = mask & (channel < WIDTH)[None, :]
    return tl.load(kv + slot[:, None] * ROW + FIRST + channel[None, :], mask=mask, other=0.0)


@triton.jit
def softmax_step(logits, valid, largest, total, dtype: tl.constexpr):
    """One block of logits [heads,keys] into a running softmax: weights, factor for earlier sums, new maximum and total."""
    logits = tl.where(valid[None, :], logits, float("-inf"))
    new = tl.maximum(largest, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # no key yet: -inf - -inf would be NaN
    weight = tl.exp2(logits - base[:, None]).to(dtype)
    factor = tl.exp2(largest - base)
    return weight, factor, new, total * factor + tl.sum(weight.to(tl.float32), 1)


@triton.jit
def any_valid(indices, start, stop, S, total, BLOCK_K: tl.constexpr):
    """Whether a slot of start .. stop is valid. Clear if every total is positive; if not, there may still have been some
    whose weights were all 0, and the result is then 0 / 0, as the reference's."""
    found = 1
    if tl.min(total, 0) == 0.0:
        found = 0
        for first in range(start, stop, BLOCK_K):
            _, valid = selected(indices, first, stop, S, BLOCK_K)
            found += tl.sum(valid.to(tl.int32), 0)
    return found


@triton.jit
def attend(
    q,
    kv,
    indices,
    head,
    start,
    stop,
    S,
    scale,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """q: one query, kv: its sequence's key rows, indices: its selection, of which start .. stop; scale: times log2 e.
    Sums not yet divided [BLOCK_H,RANK], maximum and total [BLOCK_H], and whether (> 0) a slot was valid."""
    ROW: tl.constexpr = RANK + ROPE
    latent = query_heads(q, head, HEADS, ROW, 0, RANK, RANK_P)
    if ROPE > 0:
        rope = query_heads(q, head, HEADS, ROW, RANK, ROPE, ROPE_P)
    sums = tl.zeros((BLOCK_H, RANK_P), tl.float32)
    largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        slot, valid = selected(indices, first, stop, S, BLOCK_K)
        rows = key_rows(kv, slot, valid, ROW, 0, RANK, RANK_P)
        logits = tl.dot(latent, tl.trans(rows), input_precision="ieee")
        if ROPE > 0:
            rope_rows = key_rows(kv, slot, valid, ROW, RANK, ROPE, ROPE_P)
            logits = tl.dot(rope, tl.trans(rope_rows), logits, input_precision="ieee")
        weight, factor, largest, total = softmax_step(logits * scale, valid, largest, total, rows.dtype)
        sums = tl.dot(weight, rows, sums * factor[:, None], input_precision="ieee")
    return sums, largest, total, any_valid(indices, start, stop, S, total, BLOCK_K)


@triton.jit
def store_heads(out, head, sums, total, found, HEADS: tl.constexpr, RANK: tl.constexpr, RANK_P: tl.constexpr):
    """The finished heads of one query; 0 if it had no valid slot."""
    channel = tl.arange(0, RANK_P)
    result = sums / tl.where(found > 0, total, 1.0)[:, None]
    mask = (head < HEADS)[:, None] & (channel < RANK)[None, :]
    tl.store(out + head[:, None] * RANK + channel[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def store_sums(out, head, sums, HEADS: tl.constexpr, RANK: tl.constexpr, RANK_P: tl.constexpr):
    """Unfinished heads of one query, for `combine`."""
    channel = tl.arange(0, RANK_P)
    mask = (head < HEADS)[:, None] & (channel < RANK)[None, :]
    tl.store(out + head[:, None] * RANK + channel[None, :], sums, mask=mask)


@triton.jit
def store_totals(largest_out, total_out, head, largest, total, found, HEADS: tl.constexpr):
    """What their sums are relative to; a total of -1 says that no slot was valid."""
    tl.store(largest_out + head, largest, mask=head < HEADS)
    tl.store(total_out + head, tl.where(found > 0, total, -1.0), mask=head < HEADS)


@triton.jit(do_not_specialize=["tokens", "S", "selection"])
def sparse_mla(
    q,
    kv,
    indices,
    out,
    tokens,
    S,
    selection,
    scale,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grid (B tokens head blocks). q [B,tokens,HEADS,RANK+ROPE], kv [B,S,RANK+ROPE], indices [B,tokens,selection]
    int32 -> out [B,tokens,HEADS,RANK]. Head blocks of a query are neighbours: they share its key rows in the cache."""
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    head = tl.program_id(0) % BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    q += token * (HEADS * (RANK + ROPE))
    kv += token // tokens * S * (RANK + ROPE)
    indices += token * selection
    sums, _, total, found = attend(
        q, kv, indices, head, 0, selection, S, scale, HEADS, RANK, RANK_P, ROPE, ROPE_P, BLOCK_H, BLOCK_K, STAGES
    )
    store_heads(out + token * (HEADS * RANK), head, sums, total, found, HEADS, RANK, RANK_P)


@triton.jit(do_not_specialize=["tokens", "S", "selection", "queries", "blocks"])
def sparse_mla_split(
    q,
    kv,
    indices,
    part_sums,
    part_largest,
    part_total,
    tokens,
    S,
    selection,
    queries,
    blocks,
    scale,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grid (queries head blocks, splits), queries = B tokens: `blocks` blocks of the selection a program.
    part_sums [splits,queries,HEADS,RANK], part_largest and part_total [splits,queries,HEADS], float32."""
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    head = tl.program_id(0) % BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    q += token * (HEADS * (RANK + ROPE))
    kv += token // tokens * S * (RANK + ROPE)
    indices += token * selection
    start = tl.program_id(1) * blocks * BLOCK_K
    stop = tl.minimum(start + blocks * BLOCK_K, selection)
    sums, largest, total, found = attend(
        q, kv, indices, head, start, stop, S, scale, HEADS, RANK, RANK_P, ROPE, ROPE_P, BLOCK_H, BLOCK_K, STAGES
    )
    row = tl.program_id(1) * queries.to(tl.int64) + token
    store_sums(part_sums + row * (HEADS * RANK), head, sums, HEADS, RANK, RANK_P)
    store_totals(part_largest + row * HEADS, part_total + row * HEADS, head, largest, total, found, HEADS)
