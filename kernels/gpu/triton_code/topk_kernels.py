"""Exact top-k of rows of scores, slots in ascending order, ties to the lowest slot: one program a row.

The row is read twice. First for a histogram of coarse bins (and once more for finer bins, if too many keys share the
bin of the threshold): that bounds the k-th largest key from both sides. Then every key that may be among the k largest
goes to scratch with its slot, at a place that prefix sums give it, hence in slot order. What is left is to find the
threshold among them. No atomics: the result depends on nothing but the scores, whatever they are.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from .triton_math import (
    INT_MIN,
    clamped,
    coarse_bin,
    coarse_interval,
    fine_interval,
    fine_shift,
    order_key,
    threshold_bin,
)


@triton.jit
def all_slots(out, begin, count, width, BLOCK: tl.constexpr):
    """The row of a range that holds no more than `width` slots."""
    for first in range(0, width, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(out + i, tl.where(i < count, begin + i, -1), mask=i < width)


@triton.jit
def coarse_histogram(row, start, stop, head, end, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Keys of row[start:stop] by coarse bin, those of row[head:end] only. Reads whole groups of four."""
    histogram = tl.zeros((256,), tl.int32)
    for first in tl.range(start, stop, BLOCK, num_stages=STAGES):
        i = first + tl.arange(0, BLOCK)
        key = order_key(tl.load(row + i, mask=i < (end + 3) // 4 * 4, other=0.0))
        histogram += tl.histogram(coarse_bin(key), 256, mask=(i >= head) & (i < end))
    return histogram


@triton.jit
def compact(
    row,
    start,
    stop,
    head,
    end,
    low,
    high,
    limit,
    winners,
    candidates,
    slot,
    keys,
    slots,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Keys of row[start:stop] that are above `high`, and the first `limit` of low..high, to scratch in slot order.
    winners, candidates: how many there were before `start`."""
    for first in tl.range(start, stop, BLOCK, num_stages=STAGES):
        i = first + tl.arange(0, BLOCK)
        key = order_key(tl.load(row + i, mask=i < (end + 3) // 4 * 4, other=0.0))
        competes = (i >= head) & (i < end) & (key >= low)
        wins = competes & (key > high)
        packed = tl.where(wins, 1, tl.where(competes, 65536, 0))  # two prefix sums in one: a block is below 2^15
        before = tl.cumsum(packed, 0) - packed
        rank = candidates + (before >> 16)
        place = winners + (before & 0xFFFF) + tl.minimum(rank, limit)
        kept = wins | (competes & (rank < limit))
        tl.store(keys + place, key, mask=kept)
        tl.store(slots + place, slot + i, mask=kept)
        total = tl.sum(packed, 0)
        winners += total & 0xFFFF
        candidates += total >> 16


@triton.jit
def threshold(keys, count, low, high, wanted, BLOCK: tl.constexpr):
    """The wanted-th largest of `count` keys, which lies within low..high."""
    if count <= BLOCK:  # they stay in registers
        i = tl.arange(0, BLOCK)
        held = tl.load(keys + i, mask=i < count, other=INT_MIN)
        while low < high:
            middle = low + ((high - low + 1) >> 1)
            reached = tl.sum((held >= middle).to(tl.int32), 0)
            low = tl.where(reached >= wanted, middle, low)
            high = tl.where(reached > wanted, high, tl.where(reached == wanted, middle, middle - 1))
    else:
        above = 0
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            above += tl.sum((tl.load(keys + i, mask=i < count, other=INT_MIN) > high).to(tl.int32), 0)
        while low < high:
            shift = fine_shift(low, high)
            histogram = tl.zeros((256,), tl.int32)
            for first in range(0, count, BLOCK):
                i = first + tl.arange(0, BLOCK)
                key = tl.load(keys + i, mask=i < count, other=INT_MIN)
                inside = (key >= low) & (key <= high)
                histogram += tl.histogram(tl.where(inside, key - low, 0) >> shift, 256, mask=inside)
            which, more, _ = threshold_bin(histogram, wanted - above)
            above += more
            low, high = fine_interval(which, shift, low, high)
    return low


@triton.jit
def emit(keys, slots, count, lowest, width, out, BLOCK: tl.constexpr):
    """The slots of the `width` best of `count` keys, whose least is `lowest`, in their order."""
    over = 0
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        over += tl.sum((tl.load(keys + i, mask=i < count, other=INT_MIN) > lowest).to(tl.int32), 0)
    ties = width - over
    wins, tied = 0, 0
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        key = tl.load(keys + i, mask=i < count, other=INT_MIN)
        packed = tl.where(key > lowest, 1, tl.where(key == lowest, 65536, 0))
        before = tl.cumsum(packed, 0) - packed
        rank = tied + (before >> 16)
        place = wins + (before & 0xFFFF) + tl.minimum(rank, ties)
        kept = (key > lowest) | ((key == lowest) & (rank < ties))
        tl.store(out + place, tl.load(slots + i, mask=kept, other=-1), mask=kept)
        total = tl.sum(packed, 0)
        wins += total & 0xFFFF
        tied += total >> 16


@triton.jit(do_not_specialize=["first_token", "tokens", "S", "rows", "quads", "width", "spare", "capacity"])
def topk_row(
    logits,
    key_begin,
    key_end,
    out,
    keys,
    slots,
    first_token,
    tokens,
    S,
    rows,
    quads,
    width,
    spare,
    capacity,
    BLOCK: tl.constexpr,
    FINAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grid (rows of this tile, B). logits [B,rows,4 quads] float32, key_begin, key_end [B,tokens], out [B,tokens,width];
    keys, slots: scratch [B,rows,4 capacity] int32, 4 capacity >= min(S, width + max(spare, width))."""
    batch = tl.program_id(1).to(tl.int64)
    token = batch * tokens + first_token + tl.program_id(0)
    begin, end = clamped(key_begin, token, True, S), clamped(key_end, token, True, S)
    count = end - begin
    out += token * width
    if count <= width:
        all_slots(out, begin, count, width, BLOCK)
    else:
        row = batch * rows + tl.program_id(0)
        aligned = begin // 4 * 4
        head, stop = begin - aligned, end - aligned
        logits += row * (quads * 4) + aligned
        keys += row * (capacity * 4)
        slots += row * (capacity * 4)
        which, above, found = threshold_bin(coarse_histogram(logits, 0, stop, head, stop, BLOCK, STAGES), width)
        low, high = coarse_interval(which)
        while (found > spare) & (low < high):
            shift = fine_shift(low, high)
            histogram = tl.zeros((256,), tl.int32)
            for first in tl.range(0, stop, BLOCK, num_stages=STAGES):
                i = first + tl.arange(0, BLOCK)
                key = order_key(tl.load(logits + i, mask=i < (stop + 3) // 4 * 4, other=0.0))
                inside = (i >= head) & (i < stop) & (key >= low) & (key <= high)
                histogram += tl.histogram(tl.where(inside, key - low, 0) >> shift, 256, mask=inside)
            which, more, found = threshold_bin(histogram, width - above)
            above += more
            low, high = fine_interval(which, shift, low, high)
        limit = tl.maximum(spare, width)  # beyond `spare` all candidates are equal: the first of them will do
        none = tl.full((), 0, tl.int32)
        compact(logits, 0, stop, head, stop, low, high, limit, none, none, aligned, keys, slots, BLOCK, STAGES)
        tl.debug_barrier()  # the scratch was written by other threads of this program
        kept = above + tl.minimum(found, limit)
        emit(keys, slots, kept, threshold(keys, kept, low, high, width, FINAL), width, out, FINAL // 4)
