"""The kernels of `interpreter_kernels` as variants and programs, for the tests of compiling and packing them."""

from __future__ import annotations

import interpreter_kernels

from mla2dsa.kernels.gpu.programs.program import (
    Expr,
    Launch,
    LaunchProgram,
    Repeat,
    Tensor,
    Variant,
    Workspace,
    dim,
    integer,
    variable,
)

FUNCTIONS = {
    name: getattr(interpreter_kernels, name)
    for name in ("dot", "nested", "needs_scratch", "ill_typed", "uses_constant")
}


def dot(m: int = 64, n: int = 64, k: int = 64, warps: int = 4) -> Variant:
    constants = (("M", m), ("N", n), ("K", k), ("PRECISION", "ieee"))
    arguments = (("a", "*bf16"), ("b", "*bf16"), ("out", "*fp32"))
    return Variant("dot", constants, arguments, frozenset({"a", "b", "out"}), warps, 2)


def nested(block: int = 256) -> Variant:
    arguments = (("x", "*fp32"), ("out", "*fp32"), ("n", "i32"))
    return Variant("nested", (("BLOCK", block),), arguments, frozenset({"x"}), 4, 2)


def plain(kernel: str, *arguments: tuple[str, str], **constants: int) -> Variant:
    return Variant(kernel, tuple(constants.items()), arguments, frozenset(), 4, 2)


def launch(variant: Variant, *arguments: Tensor | Workspace | Expr | float) -> Launch:
    return Launch(variant, (dim(0, 0), integer(1), integer(1)), arguments)


def two_programs(sm: int) -> dict[str, LaunchProgram]:
    """A product with more warps on sm_90, and a loop over the rows of it that is the same everywhere."""
    product = launch(dot(warps=8 if sm == 90 else 4), Tensor(0), Tensor(1), Tensor(2))
    rows = launch(nested(), Workspace(variable("t") * 4), Tensor(1, dim(0, 0) * 8), dim(0, 0) - variable("t"))
    return {
        "product": LaunchProgram(("bf16", "bf16"), (("fp32", (dim(0, 0), dim(1, 1))),), integer(0), (product,)),
        "rows": LaunchProgram(
            ("fp32",), (("fp32", (dim(0, 0),)),), dim(0, 0) * 4, (Repeat("t", dim(0, 0), integer(4), (rows,)),)
        ),
    }
