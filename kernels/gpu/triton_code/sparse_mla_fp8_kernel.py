"""Sparse MLA over latent rows of 656 bytes (FlashMLA's layout of an fp8 cache): 512 e4m3 | 4 float32 scales | 64 bfloat16.

The 512 latent channels are four groups of 128 with a scale each; the 64 rotary channels stay bfloat16. bfloat16 holds
every e4m3, so the tensor cores take the codes as they are, group by group, and the scales go to the results: to the
part of the logits that a group gives, and to the weights that its rows are summed with. No product is rounded twice.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from .sparse_mla_kernel import any_valid, query_heads, selected, softmax_step, store_heads, store_sums, store_totals

RANK = tl.constexpr(512)
ROPE = tl.constexpr(64)
GROUPS = tl.constexpr(4)
WIDTH = tl.constexpr(128)  # of a group
ROW_BYTES = tl.constexpr(656)


@triton.jit
def widened(codes, NATIVE: tl.constexpr):
    """e4m3 in uint8 -> bfloat16, exactly. Without the type (before sm_89): the same bits, moved, are a float16 that is
    2^8 too small."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16)
    wide = codes.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(tl.bfloat16)


@triton.jit
def group_rows(kv, slot, valid, group: tl.constexpr, NATIVE: tl.constexpr):
    """A group's codes [BLOCK_K,128] as bfloat16, which holds each of them, and its scales; 0 where a row is not valid."""
    channel = group * WIDTH + tl.arange(0, WIDTH)
    codes = tl.load(kv + slot[:, None] * ROW_BYTES + channel[None, :], mask=valid[:, None], other=0)
    scales = kv.to(tl.pointer_type(tl.float32)) + slot * (ROW_BYTES // 4) + (RANK // 4 + group)
    return widened(codes, NATIVE), tl.load(scales, mask=valid, other=0.0)


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
    """As `sparse_mla_kernel.attend`, the sums in four groups of 128 channels."""
    q0 = query_heads(q, head, HEADS, RANK + ROPE, 0 * WIDTH, WIDTH, WIDTH)
    q1 = query_heads(q, head, HEADS, RANK + ROPE, 1 * WIDTH, WIDTH, WIDTH)
    q2 = query_heads(q, head, HEADS, RANK + ROPE, 2 * WIDTH, WIDTH, WIDTH)
    q3 = query_heads(q, head, HEADS, RANK + ROPE, 3 * WIDTH, WIDTH, WIDTH)
    rope = query_heads(q, head, HEADS, RANK + ROPE, RANK, ROPE, ROPE)
    sums0 = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    sums1 = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    sums2 = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    sums3 = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        slot, valid = selected(indices, first, stop, S, BLOCK_K)
        rows0, scale0 = group_rows(kv, slot, valid, 0, NATIVE)
        rows1, scale1 = group_rows(kv, slot, valid, 1, NATIVE)
        rows2, scale2 = group_rows(kv, slot, valid, 2, NATIVE)
        rows3, scale3 = group_rows(kv, slot, valid, 3, NATIVE)
        logits = tl.dot(q0, tl.trans(rows0)) * scale0[None, :]
        logits += tl.dot(q1, tl.trans(rows1)) * scale1[None, :]
        logits += tl.dot(q2, tl.trans(rows2)) * scale2[None, :]
        logits += tl.dot(q3, tl.trans(rows3)) * scale3[None, :]
        logits = tl.dot(rope, tl.trans(rope_rows(kv, slot, valid)), logits)
        weight, factor, largest, total = softmax_step(logits * scale, valid, largest, total, tl.float32)
        sums0 = tl.dot((weight * scale0[None, :]).to(tl.bfloat16), rows0, sums0 * factor[:, None])
        sums1 = tl.dot((weight * scale1[None, :]).to(tl.bfloat16), rows1, sums1 * factor[:, None])
        sums2 = tl.dot((weight * scale2[None, :]).to(tl.bfloat16), rows2, sums2 * factor[:, None])
        sums3 = tl.dot((weight * scale3[None, :]).to(tl.bfloat16), rows3, sums3 * factor[:, None])
    return sums0, sums1, sums2, sums3, largest, total, any_valid(indices, start, stop, S, total, BLOCK_K)


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
    sums0, sums1, sums2, sums3, _, total, found = attend_fp8(
        q, kv, indices, head, 0, selection, S, scale, HEADS, BLOCK_H, BLOCK_K, NATIVE, STAGES
    )
    out += token * (HEADS * RANK)
    store_heads(out + 0 * WIDTH, head, sums0, total, found, HEADS, RANK, WIDTH)
    store_heads(out + 1 * WIDTH, head, sums1, total, found, HEADS, RANK, WIDTH)
    store_heads(out + 2 * WIDTH, head, sums2, total, found, HEADS, RANK, WIDTH)
    store_heads(out + 3 * WIDTH, head, sums3, total, found, HEADS, RANK, WIDTH)


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
    sums0, sums1, sums2, sums3, largest, total, found = attend_fp8(
        q, kv, indices, head, start, stop, S, scale, HEADS, BLOCK_H, BLOCK_K, NATIVE, STAGES
    )
    row = tl.program_id(1) * queries.to(tl.int64) + token
    part_sums += row * (HEADS * RANK)
    store_sums(part_sums + 0 * WIDTH, head, sums0, HEADS, RANK, WIDTH)
    store_sums(part_sums + 1 * WIDTH, head, sums1, HEADS, RANK, WIDTH)
    store_sums(part_sums + 2 * WIDTH, head, sums2, HEADS, RANK, WIDTH)
    store_sums(part_sums + 3 * WIDTH, head, sums3, HEADS, RANK, WIDTH)
    store_totals(part_largest + row * HEADS, part_total + row * HEADS, head, largest, total, found, HEADS)
