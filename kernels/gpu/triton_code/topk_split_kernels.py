"""Exact top-k for few long rows: several programs share a row, in three launches. Same result as `topk_kernels`.

topk_histogram   each program counts its slice of the row by coarse bin
topk_compact     each program reads the counts of all slices, so that it knows where its keys go, and sends those that
                 may be among the k largest to scratch: the same entries in the same order as one program would
topk_finish      one program a row finds the threshold among them and writes the slots
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from .topk_kernels import all_slots, coarse_histogram, compact, emit, threshold
from .triton_math import clamped, coarse_interval, threshold_bin


@triton.jit
def slice_of(stop, BLOCK: tl.constexpr):
    """The part of row[0:stop] that is this program's: whole blocks."""
    size = tl.cdiv(tl.cdiv(stop, BLOCK), tl.num_programs(0)) * BLOCK
    start = tl.program_id(0) * size
    return start, tl.minimum(start + size, stop)


@triton.jit(do_not_specialize=["first_token", "tokens", "S", "rows", "quads", "width"])
def topk_histogram(
    logits,
    key_begin,
    key_end,
    counts,
    first_token,
    tokens,
    S,
    rows,
    quads,
    width,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grid (slices, rows of this tile, B). logits [B,rows,4 quads] float32 -> counts [B,rows,slices,256] int32."""
    batch = tl.program_id(2).to(tl.int64)
    token = batch * tokens + first_token + tl.program_id(1)
    begin, end = clamped(key_begin, token, True, S), clamped(key_end, token, True, S)
    if end - begin > width:
        row = batch * rows + tl.program_id(1)
        aligned = begin // 4 * 4
        start, stop = slice_of(end - aligned, BLOCK)
        logits += row * (quads * 4) + aligned
        histogram = coarse_histogram(logits, start, stop, begin - aligned, end - aligned, BLOCK, STAGES)
        counts += (row * tl.num_programs(0) + tl.program_id(0)) * 256
        tl.store(counts + tl.arange(0, 256), histogram)


@triton.jit(do_not_specialize=["first_token", "tokens", "S", "rows", "quads", "width"])
def topk_compact(
    logits,
    key_begin,
    key_end,
    counts,
    keys,
    slots,
    found,
    first_token,
    tokens,
    S,
    rows,
    quads,
    width,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grid (slices, rows of this tile, B), slices <= SLICES. keys, slots: scratch [B,rows,4 quads] int32;
    found [B,rows,2] int32: the bin of the threshold, and how many keys are in it and above."""
    batch = tl.program_id(2).to(tl.int64)
    token = batch * tokens + first_token + tl.program_id(1)
    begin, end = clamped(key_begin, token, True, S), clamped(key_end, token, True, S)
    if end - begin > width:
        row = batch * rows + tl.program_id(1)
        aligned = begin // 4 * 4
        start, stop = slice_of(end - aligned, BLOCK)
        part, bins = tl.arange(0, SLICES)[:, None], tl.arange(0, 256)
        slices = tl.num_programs(0)
        table = counts + row * slices * 256 + part * 256 + bins[None, :]
        table = tl.load(table, mask=part < slices, other=0)
        which, above, inside = threshold_bin(tl.sum(table, 0), width)
        before = tl.sum(tl.where(part < tl.program_id(0), table, 0), 0)
        winners = tl.sum(tl.where(bins > which, before, 0), 0)
        candidates = tl.sum(tl.where(bins == which, before, 0), 0)
        low, high = coarse_interval(which)
        row_logits = logits + row * (quads * 4) + aligned
        keys += row * (quads * 4)
        slots += row * (quads * 4)
        head, end = begin - aligned, end - aligned
        # Entries stay in slot order: here every candidate before this slice lies before it in scratch.
        compact(
            row_logits,
            start,
            stop,
            head,
            end,
            low,
            high,
            inside,
            winners,
            candidates,
            aligned,
            keys,
            slots,
            BLOCK,
            STAGES,
        )
        if tl.program_id(0) == 0:
            tl.store(found + row * 2, which)
            tl.store(found + row * 2 + 1, above + inside)


@triton.jit(do_not_specialize=["first_token", "tokens", "S", "rows", "quads", "width"])
def topk_finish(
    key_begin,
    key_end,
    keys,
    slots,
    found,
    out,
    first_token,
    tokens,
    S,
    rows,
    quads,
    width,
    FINAL: tl.constexpr,
):
    """grid (rows of this tile, B). out [B,tokens,width] int32, the slots that `topk_row` gives."""
    batch = tl.program_id(1).to(tl.int64)
    token = batch * tokens + first_token + tl.program_id(0)
    begin, end = clamped(key_begin, token, True, S), clamped(key_end, token, True, S)
    out += token * width
    if end - begin <= width:
        all_slots(out, begin, end - begin, width, FINAL)
    else:
        row = batch * rows + tl.program_id(0)
        keys += row * (quads * 4)
        slots += row * (quads * 4)
        low, high = coarse_interval(tl.load(found + row * 2))
        kept = tl.load(found + row * 2 + 1)
        emit(keys, slots, kept, threshold(keys, kept, low, high, width, FINAL), width, out, FINAL // 4)
