"""The program that writes rows into a cache. Its output is its first input, updated."""

from __future__ import annotations

from functools import lru_cache

from .parts import launch, power_of_two
from .program import LaunchProgram, Tensor, dim, integer
from .tuning import blocks


@lru_cache(maxsize=64)
def cache_write_program(dtype: str, new_dtype: str, width: int, sm: int, slots: str = "i64") -> LaunchProgram:
    """Inputs cache [B,S,width], new [B,T,width], slots [B,T]; output the cache, in the memory of input 0.

    dtype, new_dtype ("bf16", "fp16", "fp32"), slots ("i32", "i64"): element types. sm: GPU architecture, 0 for the interpreter.
    """
    batch, size, tokens = dim(0, 0), dim(0, 1), dim(1, 1)
    arguments = (
        ("new", f"*{new_dtype}", Tensor(1)),
        ("slots", f"*{slots}", Tensor(2)),
        ("cache", f"*{dtype}", Tensor(3)),
        ("tokens", "i32", tokens),
        ("S", "i32", size),
    )
    constants = {"WIDTH": width, "WIDTH_P": power_of_two(width)}
    step = launch("cache_write", (batch * tokens,), arguments, constants, blocks("cache_write", sm))
    outputs = ((dtype, (batch, size, integer(width))),)
    return LaunchProgram((dtype, new_dtype, slots), outputs, integer(0), (step,), aliases=((0, 0),))
