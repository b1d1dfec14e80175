"""A jit function that kernels of another module call through this one."""

import triton
import triton.language as tl


@triton.jit
def plus_ten(x):  # type: ignore[no-untyped-def]
    amount = tl.full((), 10, tl.float32)
    return x + amount
