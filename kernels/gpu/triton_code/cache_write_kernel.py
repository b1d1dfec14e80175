"""Rows of new tokens into the slots of a cache, in place."""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "S"])
def cache_write(new, slots, cache, tokens, S, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr):
    """grid (sequences * tokens). new [B,tokens,WIDTH], slots [B,tokens], cache [B,S,WIDTH]; a slot outside [0, S) is not
    written."""
    row = tl.program_id(0)
    sequence = (row // tokens).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    inside = (slot >= 0) & (slot < S)
    channel = tl.arange(0, WIDTH_P)
    mask = (channel < WIDTH) & inside
    values = tl.load(new + row.to(tl.int64) * WIDTH + channel, mask=mask, other=0.0)
    place = cache + (sequence * S + tl.where(inside, slot, 0)) * WIDTH + channel
    tl.store(place, values.to(cache.dtype.element_ty), mask=mask)
