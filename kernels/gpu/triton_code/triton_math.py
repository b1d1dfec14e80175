"""What several kernels share: an integer order of scores, the bins of its histograms, and key ranges.

Every device function here is called from kernels of this package only. Integers stay in int32: after the first
histogram all candidates lie within 2^30 of each other.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

INT_MIN = tl.constexpr(-2147483648)
KEY_LOWEST = tl.constexpr(-2139095040)  # the order key of the lowest finite number
KEY_INFINITY = tl.constexpr(2139095040)
FIRST_STEP = tl.constexpr(444)  # 2^-16 in quarter octaves of float32: the first of the 32 octaves that are told apart


@triton.jit
def order_key(x):
    """float32 -> int32 whose order is the order of the numbers: -0 equals +0, NaN and -inf equal the lowest finite."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == INT_MIN, 0, bits)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(key > KEY_INFINITY, KEY_LOWEST, key)
    return tl.maximum(key, KEY_LOWEST)


@triton.jit
def coarse_bin(key):
    """Order key -> 0..255, never decreasing: the sign, 32 octaves and their quarters. What lies beyond shares a bin."""
    sign = key >> 31
    step = tl.minimum(tl.maximum(((key ^ sign) >> 21) - FIRST_STEP, 0), 127)
    return (step ^ sign) + 128


@triton.jit
def coarse_interval(which):
    """The first and the last order key of a coarse bin."""
    sign = (which - 128) >> 31
    step = (which - 128) ^ sign
    first = tl.where(step == 0, 0, (step + FIRST_STEP) << 21)
    last = tl.where(step == 127, 0x7FFFFFFF, ((step + FIRST_STEP + 1) << 21) - 1)
    return tl.where(sign < 0, last ^ sign, first), tl.where(sign < 0, first ^ sign, last)


@triton.jit
def fine_shift(low, high):
    """The smallest shift, or one more, that puts the keys low..high into 256 bins."""
    exponent = ((high - low).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.maximum(exponent - 7, 0)


@triton.jit
def fine_interval(which, shift, low, high):
    """The first and the last order key of bin `which` of those over low..high."""
    first = low + (which << shift)
    return first, tl.minimum(high, first + (1 << shift) - 1)


@triton.jit
def threshold_bin(histogram, wanted):
    """The bin that holds the wanted-th largest of the counted keys: its number, keys in bins above it, keys in it."""
    bins = tl.arange(0, 256)
    from_here_up = tl.cumsum(histogram, 0, reverse=True)
    which = tl.max(tl.where(from_here_up >= wanted, bins, 0), 0)
    return which, tl.sum(tl.where(bins > which, histogram, 0), 0), tl.sum(tl.where(bins == which, histogram, 0), 0)


@triton.jit
def clamped(bounds, offsets, mask, slots):
    """Key bounds (int32 or int64) as int32 within 0..slots; 0 where masked."""
    bound = tl.load(bounds + offsets, mask=mask, other=0)
    return tl.minimum(tl.maximum(bound, 0), slots).to(tl.int32)
