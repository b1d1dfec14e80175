"""The program that writes rows into a cache. Its output is its first input, updated."""

from __future__ import annotations

from dataclasses import dataclass

from .parts import launch, power_of_two
from .program import LaunchProgram, Tensor, dim, integer
from .tuning import blocks


@dataclass(frozen=True)
class CacheWriteCase:
    """Inputs cache [B,S,width], new [B,T,width], slots [B,T]; output the cache, in the memory of input 0.

    dtype, new_dtype ("bf16", "fp16", "fp32"), slots ("i32", "i64"): element types. sm: GPU architecture, 0 for the interpreter.
    """

    dtype: str
    new_dtype: str
    width: int
    sm: int
    slots: str = "i64"

    def program(self) -> LaunchProgram:
        batch, size, tokens = dim(0, 0), dim(0, 1), dim(1, 1)
        arguments = (
            ("new", f"*{self.new_dtype}", Tensor(1)),
            ("slots", f"*{self.slots}", Tensor(2)),
            ("cache", f"*{self.dtype}", Tensor(3)),
            ("tokens", "i32", tokens),
            ("S", "i32", size),
        )
        constants = {"WIDTH": self.width, "WIDTH_P": power_of_two(self.width)}
        step = launch("cache_write", (batch * tokens,), arguments, constants, blocks("cache_write", self.sm))
        outputs = ((self.dtype, (batch, size, integer(self.width))),)
        inputs = (self.dtype, self.new_dtype, self.slots)
        return LaunchProgram(inputs, outputs, integer(0), (step,), aliases=((0, 0),))
