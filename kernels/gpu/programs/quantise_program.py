"""Programs that write float8: rows with a scale each, and latent rows of 656 bytes."""

from __future__ import annotations

from dataclasses import dataclass

from .parts import Argument, launch, power_of_two
from .program import LaunchProgram, Tensor, ceil_div, dim, integer
from .sparse_program import FP8_ROPE
from .tuning import blocks


@dataclass(frozen=True)
class QuantiseRowsCase:
    """Input x [N,width]; outputs e4m3 [N,width] and float32 [N], the scale of each row. ue8m0: scales are powers of two."""

    dtype: str
    width: int
    ue8m0: bool
    sm: int

    def program(self) -> LaunchProgram:
        use = blocks("quantise_rows", self.sm, self.dtype, 0, self.width)
        arguments: tuple[Argument, ...] = (
            ("x", f"*{self.dtype}", Tensor(0)),
            ("out", "*fp8e4nv", Tensor(1)),
            ("scales", "*fp32", Tensor(2)),
            ("rows", "i32", dim(0, 0)),
        )
        width, block = self.width, use["BLOCK"]
        constants = {"WIDTH": width, "WIDTH_P": power_of_two(width), "BLOCK": block, "UE8M0": self.ue8m0}
        step = launch("quantise_rows", (ceil_div(dim(0, 0), block),), arguments, constants, use)
        outputs = (("fp8e4nv", (dim(0, 0), integer(width))), ("fp32", (dim(0, 0),)))
        return LaunchProgram((self.dtype,), outputs, integer(0), (step,))


@dataclass(frozen=True)
class PackLatentCase:
    """Input kv [B,S,576]; output u8 [B,S,656]."""

    dtype: str
    sm: int

    def program(self) -> LaunchProgram:
        use = blocks("pack_latent", self.sm)
        arguments: tuple[Argument, ...] = (("kv", f"*{self.dtype}", Tensor(0)), ("out", "*u8", Tensor(1)))
        step = launch("pack_latent", (dim(0, 0) * dim(0, 1),), arguments, {"ROPE": FP8_ROPE}, use)
        return LaunchProgram((self.dtype,), (("u8", (dim(0, 0), dim(0, 1), integer(656))),), integer(0), (step,))
