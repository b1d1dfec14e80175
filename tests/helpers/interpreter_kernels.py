"""Small Triton kernels for the tests of the interpreter and of ahead-of-time compilation."""
# mypy: ignore-errors

import interpreter_helpers
import triton
import triton.language as tl

OFFSET = tl.constexpr(1.0)


@triton.jit
def elementwise(a, b, out, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(a + at)
    y = tl.load(b + at)
    if OP == "add":
        r = x + y
    elif OP == "sub":
        r = x - y
    elif OP == "mul":
        r = x * y
    elif OP == "div":
        r = x / y
    elif OP == "min":
        r = tl.minimum(x, y)
    elif OP == "max":
        r = tl.maximum(x, y)
    elif OP == "less":
        r = x < y
    elif OP == "where":
        r = tl.where(x < y, y, x)
    elif OP == "neg":
        r = -x
    else:
        r = tl.abs(x)
    tl.store(out + at, r)


@triton.jit
def cast(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def dot(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def reduce(source, out, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    x = tl.load(source + m[:, None] * N + n[None, :])
    if OP == "sum":
        tl.store(out + m, tl.sum(x, 1))
    elif OP == "max":
        tl.store(out + m, tl.max(x, 1))
    elif OP == "min":
        tl.store(out + m, tl.min(x, 1))
    else:
        tl.store(out + m[:, None] * N + n[None, :], tl.cumsum(x, 1))


@triton.jit
def histogram(source, out, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < n, other=0)
    tl.store(out + tl.arange(0, BINS), tl.histogram(values, BINS, mask=at < n))


@triton.jit
def helper(x):
    doubled = x + x
    return doubled + OFFSET


@triton.jit
def outer_helper(x, BLOCK: tl.constexpr):
    return helper(x).sum(0)


@triton.jit
def nested(x, out, n, BLOCK: tl.constexpr):
    values = tl.load(x + tl.arange(0, BLOCK))
    total = 0.0
    for _ in range(tl.cdiv(n, 2)):
        total += outer_helper(values, BLOCK)
    tl.store(out, total)
    tl.store(out + 1, tl.max(helper(values), 0))
    tl.store(out + 2, tl.sum(interpreter_helpers.plus_ten(values), 0))


@triton.jit
def halvings(out, n):
    count = 0
    while n > 1:
        n = n // 2
        count += 1
        if n == 3:
            n = n - 1
            count += 1
    tl.store(out, count)
    tl.store(out + 1, n)


@triton.jit
def uses_constant(out):
    tl.store(out, OFFSET)


@triton.jit
def grid_positions(out):
    x = tl.program_id(0)
    y = tl.program_id(1)
    z = tl.program_id(2)
    at = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(out + at, at)


@triton.jit
def double(out, number, fraction):
    tl.store(out, (number * 2).to(tl.int64))
    tl.store(out + 1, (fraction * 1073741824).to(tl.int64))


@triton.jit
def fails_late():
    if tl.program_id(0) == 2:
        1 / 0  # noqa: B018


@triton.jit
def needs_scratch(x, out, n, BLOCK: tl.constexpr):
    view = tl.make_tensor_descriptor(x, [n], [1], [BLOCK])
    tl.store(out + tl.arange(0, BLOCK), view.load([0]))


@triton.jit
def ill_typed(x):
    tl.store(x, tl.dot(x, x))
