"""What torch launches is what the packer compiles: Triton's own launch path up to the launch, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla2dsa.kernels.gpu import launch
from mla2dsa.kernels.gpu.programs.catalogue import catalogue
from mla2dsa.kernels.gpu.programs.program import LaunchProgram, Variant
from mla2dsa.kernels.gpu.triton_code.registry import jit_function

triton = pytest.importorskip("triton")


class Driver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 99  # not the one that a real GPU has: what is compiled here must not be launched there

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Kernels by name, as Triton compiled them for the launches of a runner."""
    found: dict[str, list[Any]] = {}

    class Warm:
        def __init__(self, kernel: str) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            function = jit_function(self._kernel)
            return lambda **arguments: found.setdefault(self._kernel, []).append(
                function.warmup(grid=grid, **arguments)
            )

    monkeypatch.setattr(launch, "jit_function", Warm)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return found


def run(program: LaunchProgram, *shapes: tuple[int, ...]) -> None:
    inputs = (torch.zeros(s, dtype=launch.DTYPES[t]) for s, t in zip(shapes, program.inputs, strict=True))
    launch.Launcher(program)(*inputs)


def check(variant: Variant, kernels: list[Any]) -> None:
    for kernel in kernels:
        kinds = [(name, kind) for name, kind in kernel.src.signature.items() if kind != "constexpr"]
        assert kinds == list(variant.arguments)
        names = list(kernel.src.signature)
        hinted = {names[path[0]] for path, hints in kernel.src.attrs.items() if ["tt.divisibility", 16] in hints}
        assert hinted == variant.aligned
        assert (kernel.metadata.num_warps, kernel.metadata.num_stages) == (variant.num_warps, variant.num_stages)


@pytest.mark.parametrize("tokens", [1, 16])  # neither 1 nor a multiple of 16 makes another variant
@pytest.mark.parametrize("slots", [992, 999])
def test_indexer(compiled: dict[str, list[Any]], tokens: int, slots: int) -> None:
    program = catalogue(90)["lightning_indexer.fp8e4nv.h16.d128.k512.decode"]
    run(program, (1, tokens, 16, 128), (1, slots, 128), (1, slots), (1, tokens, 16), (1, tokens), (1, tokens))
    assert [variant.kernel for variant in program.variants()] == list(compiled)
    for variant in program.variants():
        check(variant, compiled[variant.kernel])


def test_sparse_mla(compiled: dict[str, list[Any]]) -> None:
    program = catalogue(90)["sparse_mla.bf16.h32.r256.d64.decode"]
    run(program, (2, 1, 32, 320), (2, 999, 320), (2, 1, 64))
    for variant in program.variants():
        check(variant, compiled[variant.kernel])
