"""Programs that write float8: rows with a scale each, and latent rows of 656 bytes."""

from __future__ import annotations

from functools import lru_cache

from .parts import Argument, launch, power_of_two
from .program import LaunchProgram, Tensor, ceil_div, dim, integer
from .sparse_program import FP8_ROPE
from .tuning import blocks


@lru_cache(maxsize=64)
def quantise_rows_program(dtype: str, width: int, ue8m0: bool, sm: int) -> LaunchProgram:
    """Input x [N,width]; outputs e4m3 [N,width] and float32 [N], the scale of each row."""
    use = blocks("quantise_rows", sm, dtype, 0, width)
    arguments: tuple[Argument, ...] = (
        ("x", f"*{dtype}", Tensor(0)),
        ("out", "*fp8e4nv", Tensor(1)),
        ("scales", "*fp32", Tensor(2)),
        ("rows", "i32", dim(0, 0)),
    )
    constants = {"WIDTH": width, "WIDTH_P": power_of_two(width), "BLOCK": use["BLOCK"], "UE8M0": ue8m0}
    step = launch("quantise_rows", (ceil_div(dim(0, 0), use["BLOCK"]),), arguments, constants, use)
    outputs = (("fp8e4nv", (dim(0, 0), integer(width))), ("fp32", (dim(0, 0),)))
    return LaunchProgram((dtype,), outputs, integer(0), (step,))


@lru_cache(maxsize=8)
def pack_latent_program(dtype: str, sm: int) -> LaunchProgram:
    """Input kv [B,S,576]; output u8 [B,S,656]."""
    use = blocks("pack_latent", sm)
    arguments: tuple[Argument, ...] = (("kv", f"*{dtype}", Tensor(0)), ("out", "*u8", Tensor(1)))
    step = launch("pack_latent", (dim(0, 0) * dim(0, 1),), arguments, {"ROPE": FP8_ROPE}, use)
    return LaunchProgram((dtype,), (("u8", (dim(0, 0), dim(0, 1), integer(656))),), integer(0), (step,))
