"""Puts together what the programs that shared a query's selection left behind: see `sparse_mla_kernel`."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["queries", "splits"])
def combine(
    part_sums,
    part_largest,
    part_total,
    out,
    queries,
    splits,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_P: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """grid (queries, HEADS), splits <= SPLITS. part_sums [splits,queries,HEADS,RANK], part_largest and part_total [splits,queries,HEADS],
    float32 -> out [queries,HEADS,RANK]. A split with total -1 had no valid slot; without any the result is 0."""
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    rows = queries.to(tl.int64) * HEADS
    part, channel = tl.arange(0, SPLITS), tl.arange(0, RANK_P)
    parts = tl.load(part_total + part * rows + row, mask=part < splits, other=-1.0)
    peaks = tl.load(part_largest + part * rows + row, mask=part < splits, other=float("-inf"))
    found = tl.max(tl.where(parts == -1.0, 0, 1), 0)
    peak = tl.max(peaks, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(peaks - base)
    whole = tl.sum(tl.where(parts == -1.0, 0.0, parts * weights), 0)
    result = tl.zeros((RANK_P,), tl.float32)
    for i in range(splits):
        values = tl.load(part_sums + (i * rows + row) * RANK + channel, mask=channel < RANK, other=0.0)
        result += values * tl.exp2(tl.load(part_largest + i * rows + row) - base)
    result = result / tl.where(found > 0, whole, 1.0)
    tl.store(out + row * RANK + channel, result.to(out.dtype.element_ty), mask=channel < RANK)
