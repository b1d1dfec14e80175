"""Triton kernels on CPU tensors: bfloat16 and float8 as torch has them, nested jit functions, and nothing left behind."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import interpreter_kernels as kernels
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

from mla2dsa.kernels.gpu.emulator import interpreter, interpreter_builder
from mla2dsa.kernels.gpu.emulator.interpreter import interpreted

BF16, F32, E4M3, E5M2 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2
ARITHMETIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.fmin,
    "max": torch.fmax,
    "less": torch.lt,
    "where": lambda a, b: torch.where(a < b, b, a),
    "abs": lambda a, b: a.abs(),
}


def numbers(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of many magnitudes and both signs, with zeros, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * 2.0 ** torch.randint(-20, 20, (count,), generator=generator)
    values[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42])
    return values[torch.randperm(count, generator=generator)].to(dtype)


def same(got: Tensor, want: Tensor) -> bool:
    """Equal bit for bit; any NaN equals any other."""
    assert got.dtype == want.dtype
    both_nan = got.isnan() & want.isnan() if got.dtype.is_floating_point else torch.zeros(got.shape, dtype=torch.bool)
    carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    return bool(((got.view(carrier) == want.view(carrier)) | both_nan).all())


def elementwise(op: str, a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(a.shape, dtype=torch.bool if op == "less" else a.dtype)
    interpreted(kernels.elementwise)[(2,)](a, b, out, OP=op, BLOCK=a.numel() // 2)
    return out


@pytest.mark.parametrize("op", ARITHMETIC)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_arithmetic_is_torchs_bit_for_bit(op: str, dtype: torch.dtype) -> None:
    a, b = numbers(4096, dtype), numbers(4096, dtype, seed=1)
    assert same(elementwise(op, a, b), ARITHMETIC[op](a, b))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_negation_up_to_the_sign_of_zero(dtype: torch.dtype) -> None:
    a = numbers(4096, dtype).nan_to_num()
    assert torch.equal(elementwise("neg", a, a), -a)


@pytest.mark.parametrize("op", ["add", "mul", "less", "max"])
def test_triton_alone_computes_bfloat16_wrong(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the builder is for: when this fails, Triton has learnt bfloat16 and the fix may go."""
    monkeypatch.setattr(interpreter, "Builder", lambda memory: stock.InterpreterBuilder())
    a, b = numbers(4096, BF16), numbers(4096, BF16, seed=1)
    assert not same(elementwise(op, a, b), ARITHMETIC[op](a, b))


FLOATS = (BF16, torch.float16, F32)
CASTS = [*itertools.product((*FLOATS, E4M3, E5M2), repeat=2), *itertools.product(FLOATS, [torch.int32])]
CASTS += [(torch.int32, dtype) for dtype in FLOATS]


@pytest.mark.parametrize(("source", "target"), CASTS, ids=str)
def test_casts_are_torchs_bit_for_bit(source: torch.dtype, target: torch.dtype) -> None:
    values = numbers(4096, F32)
    if torch.int32 in (source, target):
        values = values.nan_to_num().clamp(-60000, 60000)
    values = values.to(source)
    out = torch.empty(values.shape, dtype=target)
    interpreted(kernels.cast)[(1,)](values, out, BLOCK=4096)
    if target in (E4M3, E5M2) and target != source:  # as the GPU: the largest number instead of infinity or NaN
        values = values.float().clamp(torch.finfo(target).min, torch.finfo(target).max)
    assert same(out, values.to(target))


def test_triton_alone_rounds_casts_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "Builder", lambda memory: stock.InterpreterBuilder())
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    for target in (BF16, E4M3):
        out = torch.empty(values.shape, dtype=target)
        interpreted(kernels.cast)[(1,)](values, out, BLOCK=4096)
        assert not same(out, values.to(target))


def test_every_float8_widens_exactly() -> None:
    for dtype in (E4M3, E5M2):
        values = torch.arange(256, dtype=torch.uint8).view(dtype)
        out = torch.empty(256)
        interpreted(kernels.cast)[(1,)](values, out, BLOCK=256)
        assert same(out, values.float())


def dot(a: Tensor, b: Tensor, precision: str = "ieee") -> Tensor:
    out = torch.empty(a.shape[0], b.shape[1])
    interpreted(kernels.dot)[(1,)](a, b, out, M=a.shape[0], N=b.shape[1], K=a.shape[1], PRECISION=precision)
    return out


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32, E4M3, E5M2], ids=str)
def test_dot_is_torchs_float32_product(dtype: torch.dtype) -> None:
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    assert same(dot(a, b), a.float() @ b.float())


def test_dot_of_float32_loses_what_tf32_loses() -> None:
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    error = float((dot(a, b, "tf32") - a @ b).norm() / (a @ b).norm())
    assert 1e-4 < error < 1e-3


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("op", ["sum", "max", "min", "cumsum"])
def test_reductions(op: str, dtype: torch.dtype) -> None:
    values = torch.randint(-50, 50, (8, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    want = {"sum": values.sum(1), "max": values.amax(1), "min": values.amin(1), "cumsum": values.cumsum(1)}[op]
    out = torch.empty(want.shape, dtype=dtype)
    interpreted(kernels.reduce)[(1,)](values, out, OP=op, M=8, N=16)
    assert torch.equal(out, want)


def test_histogram_counts_only_what_is_in_range() -> None:
    values = torch.tensor([0, 1, 1, 7, 8, 9, -1, 3], dtype=torch.int32)
    out = torch.empty(8, dtype=torch.int32)
    interpreted(kernels.histogram)[(1,)](values, out, 8, BLOCK=8, BINS=8)
    assert out.tolist() == [1, 2, 0, 1, 0, 0, 0, 1]
    interpreted(kernels.histogram)[(1,)](values, out, 3, BLOCK=8, BINS=8)
    assert out.tolist() == [1, 2, 0, 0, 0, 0, 0, 0]


def test_nested_jit_functions_of_every_kind() -> None:
    """A helper of the module, one reached through another module, one of triton.language, one as a method, a loop."""
    x = torch.arange(1, 9, dtype=F32)
    out = torch.empty(3)
    interpreted(kernels.nested)[(1,)](x, out, 5, BLOCK=8)
    rounds = -(-5 // 2)  # tl.cdiv
    want = [float((x * 2 + 1).sum()) * rounds, float((x * 2 + 1).max()), float((x + 10).sum())]
    assert out.tolist() == want


def test_a_loop_until_a_value_is_found() -> None:
    out = torch.empty(2, dtype=torch.int32)
    interpreted(kernels.halvings)[(1,)](out, 1000)
    assert out.tolist() == [10, 1]


def test_a_constant_of_the_module_is_read_at_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.empty(1)
    for value in (3.0, 4.0):
        monkeypatch.setattr(kernels, "OFFSET", tl.constexpr(value))
        interpreted(kernels.uses_constant)[(1,)](out)
        assert out.item() == value


def test_a_kernel_defined_in_a_function_sees_what_it_closes_over() -> None:
    helper = kernels.helper

    @triton.jit
    def local(x, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        tl.store(out + at, helper(tl.load(x + at)))

    x, out = torch.arange(8, dtype=F32), torch.empty(8)
    interpreted(local)[(1,)](x, out, BLOCK=8)
    assert torch.equal(out, x * 2 + 1)


def test_programs_cover_the_grid_and_know_it() -> None:
    out = torch.zeros(2, 3, 4, dtype=torch.int32)
    interpreted(kernels.grid_positions)[(2, 3, 4)](out)
    assert torch.equal(out.flatten(), torch.arange(24, dtype=torch.int32))
    interpreted(kernels.grid_positions)[lambda arguments: (1,)](out)
    interpreted(kernels.grid_positions)[(1,)](out, num_warps=8, num_stages=2)


LANGUAGE = [tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, stock]


def test_a_launch_leaves_triton_as_it_was() -> None:
    held = [*LANGUAGE, kernels, kernels.interpreter_helpers]
    before = [dict(vars(holder)) for holder in held]
    interpreted(kernels.nested)[(1,)](torch.ones(8), torch.empty(3), 5, BLOCK=8)
    with pytest.raises(IndexError):
        interpreted(kernels.nested)[(1,)](torch.ones(7), torch.empty(3), 5, BLOCK=8)
    assert all(dict(vars(holder)) == content for holder, content in zip(held, before, strict=True))


def test_a_kernel_compiles_after_it_was_interpreted() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    interpreted(kernels.nested)[(1,)](torch.ones(8), torch.empty(3), 5, BLOCK=8)
    signature = {"x": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=kernels.nested, signature=signature, constexprs={"BLOCK": 8})
    options = {"enable_fp_fusion": True}  # Triton 3.9 warns where it is not said
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


@pytest.mark.parametrize(
    ("kernel", "arguments", "message"),
    [
        ("cast", (torch.ones(15), torch.empty(16)), "cast reads 4 bytes at byte 60 of source, which holds 60"),
        ("cast", (torch.ones(16), torch.empty(15)), "cast writes 4 bytes at byte 60 of target, which holds 60"),
        ("cast", (torch.ones(20)[2:17], torch.empty(16)), "cast reads 4 bytes at byte 60 of source, which holds 60"),
    ],
    ids=["read", "write", "view"],
)
def test_access_outside_a_tensor_is_refused(kernel: str, arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(IndexError, match=message):
        interpreted(getattr(kernels, kernel))[(1,)](*arguments, BLOCK=16)


def test_masked_lanes_may_point_anywhere() -> None:
    values, out = torch.arange(8, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    interpreted(kernels.histogram)[(1,)](values, out, 3, BLOCK=1024, BINS=8)
    assert out.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_declared_types_are_kept() -> None:
    out = torch.empty(2, dtype=torch.int64)
    big = 2**31 - 1
    interpreted(kernels.double)[(1,)](out, big, 0.1)
    assert out[0] == -2  # int32, as Triton takes it from the value
    interpreted(kernels.double, types={"number": "i64"})[(1,)](out, big, 0.1)
    assert out[0] == 2 * big
    assert out[1] == int(np.float32(0.1) * np.float32(2**30))  # a float is float32, not Python's
    with pytest.raises(OverflowError):
        interpreted(kernels.double, types={"number": "i32"})[(1,)](out, 2**31, 0.1)
    workspace = torch.zeros(8, dtype=torch.uint8)
    interpreted(kernels.cast, types={"target": "*fp32"})[(1,)](torch.ones(2), workspace, BLOCK=2)
    assert workspace.view(F32).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (len, (), "not a @triton.jit function"),
        (kernels.cast, (torch.ones(2), [1], 2), "argument target is a list"),
        (kernels.cast, (torch.ones(2), torch.ones(2), 2, 3), "too many positional arguments"),
        (kernels.cast, (torch.ones(2),), "missing a required argument"),
    ],
    ids=["function", "type", "many", "few"],
)
def test_wrong_calls_are_refused(function: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        interpreted(function)[(1,)](*arguments)


def test_float8_arithmetic_is_refused() -> None:
    values = torch.ones(16).to(E4M3)
    with pytest.raises(NotImplementedError, match="convert it first"):
        elementwise("add", values, values)


def test_an_error_says_in_which_program() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        interpreted(kernels.fails_late)[(3,)]()
    assert caught.value.__notes__ == ["in program (2, 0, 0) of (3, 1, 1) of the Triton kernel fails_late"]


def test_the_same_kernel_has_one_twin() -> None:
    assert interpreter._twin(kernels.helper) is interpreter._twin(kernels.helper)
    assert interpreter_builder.Builder is interpreter.Builder
    assert "triton" in sys.modules
