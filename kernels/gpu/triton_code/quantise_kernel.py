"""Rows to float8 (e4m3) with one scale each, and latent rows to FlashMLA's 656 bytes: bit for bit as `reference_fp8`."""

# mypy: ignore-errors
import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)  # e4m3
SMALLEST_SCALE = tl.constexpr(2.0**-100)  # so that a row of zeros divides by something
LATENT = tl.constexpr(512)
GROUPS = tl.constexpr(4)
ROW_BYTES = tl.constexpr(656)


@triton.jit
def scale_of(values, UE8M0: tl.constexpr):
    """The scale of each row of float32 values; UE8M0: the next power of two. NaN if the row holds one."""
    size = tl.max(tl.abs(values), 1)
    scale = tl.maximum(tl.div_rn(size, LARGEST), SMALLEST_SCALE)
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        up = (bits + 0x7FFFFF) & 0x7F800000
        scale = tl.where(bits < 0x7F800000, up, bits).to(tl.float32, bitcast=True)
    return tl.where(tl.sum((values != values).to(tl.int32), 1) > 0, float("nan"), scale)


@triton.jit
def scaled(values, scale):
    """values [rows,n] / scale [rows] within what e4m3 holds. NaN stays NaN."""
    quotient = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    return tl.where(quotient > LARGEST, LARGEST, tl.where(quotient < -LARGEST, -LARGEST, quotient))


@triton.jit(do_not_specialize=["rows"])
def quantise_rows(
    x, out, scales, rows, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, BLOCK: tl.constexpr, UE8M0: tl.constexpr
):
    """grid (rows / BLOCK). x [rows,WIDTH] -> out [rows,WIDTH] e4m3, scales [rows] float32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH_P)
    mask = (row < rows)[:, None] & (channel < WIDTH)[None, :]
    values = tl.load(x + row[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = scale_of(values, UE8M0)
    tl.store(out + row[:, None] * WIDTH + channel[None, :], scaled(values, scale).to(tl.float8e4nv), mask=mask)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit
def pack_latent(kv, out, ROPE: tl.constexpr):
    """grid (rows). kv [rows,512+ROPE] -> out [rows,656] uint8: 512 e4m3 | 4 float32 scales | 64 bfloat16."""
    row = tl.program_id(0).to(tl.int64)
    group, channel = tl.arange(0, GROUPS)[:, None], tl.arange(0, LATENT // GROUPS)[None, :]
    latent = group * (LATENT // GROUPS) + channel
    kv += row * (LATENT + ROPE)
    values = tl.load(kv + latent).to(tl.float32)
    scale = scale_of(values, False)
    codes = scaled(values, scale).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(out + row * ROW_BYTES + latent, codes)
    scales = out.to(tl.pointer_type(tl.float32)) + row * (ROW_BYTES // 4) + LATENT // 4
    tl.store(scales + tl.arange(0, GROUPS), scale)
    rope = tl.arange(0, ROPE)
    first = out.to(tl.pointer_type(tl.bfloat16)) + row * (ROW_BYTES // 2) + LATENT // 2 + 2 * GROUPS
    tl.store(first + rope, tl.load(kv + LATENT + rope).to(tl.bfloat16))
