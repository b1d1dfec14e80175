"""Sparse MLA over latent rows of 656 bytes (FlashMLA's layout of an fp8 cache): 512 e4m3 | 4 float32 scales | 64 bfloat16.

The 512 latent channels are four groups of 128 with a scale each; the 64 rotary channels stay bfloat16. A group is
widened and scaled in registers, rounded to bfloat16, and from there on all is as in `sparse_mla_kernel`.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from .sparse_mla_kernel import any_valid, query_heads, selected, softmax_step, store_heads, store_partial

RANK = tl.constexpr(512)
ROPE = tl.constexpr(64)
GROUPS = tl.constexpr(4)
ROW_BYTES = tl.constexpr(656)


@triton.jit
def widened(codes, NATIVE: tl.constexpr):
    """e4m3 in uint8 -> float32. Without the type (before sm_89): its bits are those of a float16 without four of the
    exponent's weight, 2^8 too small."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = codes.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def latent_rows(kv, slot, valid, BLOCK_K: tl.constexpr, NATIVE: tl.constexpr):
    """[BLOCK_K,512] bfloat16, zeros where a row is not valid."""
    channel, group = tl.arange(0, RANK), tl.arange(0, GROUPS)
    codes = tl.load(kv + slot[:, None] * ROW_BYTES + channel[None, :], mask=valid[:, None], other=0)
    scales = kv.to(tl.pointer_type(tl.float32)) + slot[:, None] * (ROW_BYTES // 4) + RANK // 4 + group[None, :]
    scales = tl.load(scales, mask=valid[:, None], other=0.0)
    values = tl.reshape(widened(codes, NATIVE), (BLOCK_K, GROUPS, RANK // GROUPS)) * scales[:, :, None]
    return tl.reshape(values.to(tl.bfloat16), (BLOCK_K, RANK))


@triton.jit
def rope_rows(kv, slot, valid):
    """[BLOCK_K,64] bfloat16, zeros where a row is not valid."""
    first = kv.to(tl.pointer_type(tl.bfloat16)) + slot[:, None] * (ROW_BYTES // 2) + RANK // 2 + 2 * GROUPS
    return tl.load(first + tl.arange(0, ROPE)[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def attend_fp8(
    q,
    kv,
    indices,
    head,
    start,
    stop,
    S,
    scale,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NATIVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `sparse_mla_kernel.attend`."""
    latent = query_heads(q, head, HEADS, RANK + ROPE, 0, RANK, RANK)
    rope = query_heads(q, head, HEADS, RANK + ROPE, RANK, ROPE, ROPE)
    sums = tl.zeros((BLOCK_H, RANK), tl.float32)
    largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        slot, valid = selected(indices, first, stop, S, BLOCK_K)
        rows = latent_rows(kv, slot, valid, BLOCK_K, NATIVE)
        logits = tl.dot(latent, tl.trans(rows))
        logits = tl.dot(rope, tl.trans(rope_rows(kv, slot, valid)), logits)
        weight, factor, largest, total = softmax_step(logits * scale, valid, largest, total, tl.bfloat16)
        sums = tl.dot(weight, rows, sums * factor[:, None])
    return sums, largest, total, any_valid(indices, start, stop, S, total, BLOCK_K)


@triton.jit(do_not_specialize=["tokens", "S", "selection"])
def sparse_mla_fp8(
    q,
    kv,
    indices,
    out,
    tokens,
    S,
    selection,
    scale,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NATIVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grid (B tokens head blocks). q [B,tokens,HEADS,576] bfloat16, kv [B,S,656] uint8, indices
    [B,tokens,selection] int32 -> out [B,tokens,HEADS,512] bfloat16."""
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    head = tl.program_id(0) % BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    q += token * (HEADS * (RANK + ROPE))
    kv += token // tokens * S * ROW_BYTES
    indices += token * selection
    sums, _, total, found = attend_fp8(
        q, kv, indices, head, 0, selection, S, scale, HEADS, BLOCK_H, BLOCK_K, NATIVE, STAGES
    )
    store_heads(out + token * (HEADS * RANK), head, sums, total, found, HEADS, RANK, RANK)


@triton.jit(do_not_specialize=["tokens", "S", "selection", "queries", "blocks"])
def sparse_mla_fp8_split(
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
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NATIVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grid (queries head blocks, splits): as `sparse_mla_split`."""
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    head = tl.program_id(0) % BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    q += token * (HEADS * (RANK + ROPE))
    kv += token // tokens * S * ROW_BYTES
    indices += token * selection
    start = tl.program_id(1) * blocks * BLOCK_K
    stop = tl.minimum(start + blocks * BLOCK_K, selection)
    sums, largest, total, found = attend_fp8(
        q, kv, indices, head, start, stop, S, scale, HEADS, BLOCK_H, BLOCK_K, NATIVE, STAGES
    )
    row = tl.program_id(1) * queries.to(tl.int64) + token
    store_partial(part_sums, part_largest, part_total, row, head, sums, largest, total, found, HEADS, RANK, RANK)
