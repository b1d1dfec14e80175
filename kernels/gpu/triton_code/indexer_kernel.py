"""Scores of the lightning indexer: I[t,s] = k_scale[s] sum_h w[t,h] ReLU(q[t,h] . k[s]), in float32.

Many queries: a block of keys stays on chip and the program walks over queries. Few queries: those stay, and the
program walks over keys. Scores outside a query's key range are not computed where a whole block is outside, and not
written: the top-k that follows does not read them. ReLU keeps a NaN, as the reference does.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from .triton_math import clamped


@triton.jit
def key_block(k, row, slot, S, DIM: tl.constexpr, DIM_P: tl.constexpr):
    """Keys [BLOCK_S,DIM_P], zeros beyond S and DIM. slot: within the sequence, row: within all sequences."""
    channel = tl.arange(0, DIM_P)
    mask = (slot < S)[:, None] & (channel < DIM)[None, :]
    return tl.load(k + row[:, None] * DIM + channel[None, :], mask=mask, other=0.0)


@triton.jit
def query_block(
    q, token, head, mask, HEADS: tl.constexpr, HEADS_P: tl.constexpr, DIM: tl.constexpr, DIM_P: tl.constexpr
):
    """Heads of queries as rows, [queries HEADS_P, DIM_P]."""
    channel = tl.arange(0, DIM_P)
    return tl.load(
        q + token[:, None] * (HEADS * DIM) + head[:, None] * DIM + channel[None, :],
        mask=mask[:, None] & (channel < DIM)[None, :],
        other=0.0,
    )


@triton.jit
def scores(
    keys, queries, weights, head, BLOCK_S: tl.constexpr, COUNT: tl.constexpr, HEADS: tl.constexpr, HEADS_P: tl.constexpr
):
    """[BLOCK_S,COUNT] from keys [BLOCK_S,d], queries [COUNT HEADS_P,d], weights [COUNT HEADS_P]: heads are columns, so
    that their sum needs no exchange between rows."""
    dots = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    parts = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * weights[None, :]
    if HEADS < HEADS_P:  # 0 * inf is NaN: a head that is not there must not reach the sum
        parts = tl.where((head < HEADS)[None, :], parts, 0.0)
    return tl.sum(tl.reshape(parts, (BLOCK_S, COUNT, HEADS_P)), 2)


@triton.jit(do_not_specialize=["first_token", "count", "tokens", "S", "rows", "quads"])
def indexer_prefill(
    q,
    k,
    k_scale,
    weights,
    key_begin,
    key_end,
    logits,
    first_token,
    count,
    tokens,
    S,
    rows,
    quads,
    HEADS: tl.constexpr,
    HEADS_P: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STEP_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grid (S / BLOCK_S, count / BLOCK_T, B), STEP_T queries at a time. q [B,tokens,HEADS,DIM], k [B,S,DIM], k_scale
    [B,S] float32 or None, weights [B,tokens,HEADS], key_begin, key_end [B,tokens]; logits [B,rows,4 quads] float32 of
    the queries first_token .. first_token + count - 1."""
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_S
    start = tl.program_id(1) * BLOCK_T
    stop = tl.minimum(start + BLOCK_T, count)
    token = batch * tokens + first_token
    query = start + tl.arange(0, BLOCK_T)
    begin = clamped(key_begin, token + query, query < stop, S)
    end = clamped(key_end, token + query, query < stop, S)
    lowest = tl.min(tl.where(begin < end, begin, S), 0)
    if (first < tl.max(tl.where(begin < end, end, 0), 0)) & (first + BLOCK_S > lowest):
        slot = first + tl.arange(0, BLOCK_S)
        keys = key_block(k, batch * S + slot, slot, S, DIM, DIM_P)
        if k_scale is not None:
            scale = tl.load(k_scale + batch * S + slot, mask=slot < S, other=0.0)
        column = tl.arange(0, STEP_T * HEADS_P)
        head = column % HEADS_P
        for step in tl.range(start, stop, STEP_T, num_stages=STAGES):
            row = step + column // HEADS_P
            mask = (row < stop) & (head < HEADS)
            queries = query_block(q, token + row, head, mask, HEADS, HEADS_P, DIM, DIM_P)
            weight = tl.load(weights + (token + row) * HEADS + head, mask=mask, other=0.0).to(tl.float32)
            score = scores(keys, queries, weight, head, BLOCK_S, STEP_T, HEADS, HEADS_P)
            if k_scale is not None:
                score = score * scale[:, None]
            each = step + tl.arange(0, STEP_T)
            first_key = clamped(key_begin, token + each, each < stop, S)
            last_key = clamped(key_end, token + each, each < stop, S)
            inside = (slot[:, None] >= first_key[None, :]) & (slot[:, None] < last_key[None, :])
            out = logits + (batch * rows + each)[None, :] * (quads * 4) + slot[:, None]
            tl.store(out, score, mask=inside)


@triton.jit(do_not_specialize=["first_token", "count", "tokens", "S", "rows", "quads", "blocks"])
def indexer_decode(
    q,
    k,
    k_scale,
    weights,
    key_begin,
    key_end,
    logits,
    first_token,
    count,
    tokens,
    S,
    rows,
    quads,
    blocks,
    HEADS: tl.constexpr,
    HEADS_P: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grid (S / (blocks BLOCK_S), count / QUERIES, B): `blocks` blocks of keys a program. Tensors as above."""
    batch = tl.program_id(2).to(tl.int64)
    token = batch * tokens + first_token
    row = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    begin = clamped(key_begin, token + row, row < count, S)
    end = clamped(key_end, token + row, row < count, S)
    start = tl.program_id(0) * blocks * BLOCK_S
    stop = tl.minimum(start + blocks * BLOCK_S, tl.max(tl.where(begin < end, end, 0), 0))
    start = tl.maximum(start, tl.min(tl.where(begin < end, begin, S), 0) // BLOCK_S * BLOCK_S)
    if start < stop:
        column = tl.arange(0, QUERIES * HEADS_P)
        head = column % HEADS_P
        query = tl.program_id(1) * QUERIES + column // HEADS_P
        mask = (query < count) & (head < HEADS)
        queries = query_block(q, token + query, head, mask, HEADS, HEADS_P, DIM, DIM_P)
        weight = tl.load(weights + (token + query) * HEADS + head, mask=mask, other=0.0).to(tl.float32)
        for first in tl.range(start, stop, BLOCK_S, num_stages=STAGES):
            slot = first + tl.arange(0, BLOCK_S)
            keys = key_block(k, batch * S + slot, slot, S, DIM, DIM_P)
            score = scores(keys, queries, weight, head, BLOCK_S, QUERIES, HEADS, HEADS_P)
            if k_scale is not None:
                score = score * tl.load(k_scale + batch * S + slot, mask=slot < S, other=0.0)[:, None]
            inside = (slot[:, None] >= begin[None, :]) & (slot[:, None] < end[None, :])
            out = logits + (batch * rows + row)[None, :] * (quads * 4) + slot[:, None]
            tl.store(out, score, mask=inside)
