"""Every launch of the plugin is the one that Triton's own launcher is asked for: kernel, grid, block, shared memory, arguments.

What Triton gets is written down by a stand-in for the compiled kernel in `Launcher`, which serves torch; the plugin's, by a
stand-in for the CUDA driver. Both have the same tensors, so pointers can be compared as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from plugin_harness import Copy, Harness, Launch, mock
from plugin_readers import read_bundle
from plugin_samples import OPS, SIZES, fields, tensors

from mla2dsa.kernels.gpu import launch as triton_launch
from mla2dsa.kernels.gpu.binaries.bundle import BundledKernel
from mla2dsa.kernels.gpu.binaries.manifest import kernel_name
from mla2dsa.kernels.gpu.launch import Launcher
from mla2dsa.kernels.gpu.programs.op_program import OpProgram
from mla2dsa.kernels.gpu.programs.program import Variant

pytest.importorskip("triton")
STREAM = 0x5EA4


@dataclass
class Asked:
    """A launch that Triton was asked for."""

    kernel: str
    grid: tuple[int, ...]
    values: dict[str, Any]


def asked_of_triton(
    op: OpProgram, sm: int, units: int, inputs: Sequence[torch.Tensor], monkeypatch: Any
) -> tuple[list[Asked], Any, Any]:
    """The launches of torch's path for these tensors, its form's program, and its output."""
    asked: list[Asked] = []

    class Recorder:
        def __init__(self, kernel: str) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **values: asked.append(Asked(self._kernel, grid, values))

    monkeypatch.setattr(triton_launch, "jit_function", Recorder)
    shapes = [tuple(tensor.shape) for tensor in inputs]
    form = next(it for it in op.forms if sm in it.sms and it.guard.value(shapes, {"units": units}) > 0)
    (output,) = Launcher(form.program)(*inputs)
    return asked, form.program, output


def word(value: Any, kind: str) -> int:
    """As it lies in the 8 bytes of a parameter."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind == "fp32":
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    return int(value) % 2 ** (32 if kind in ("i32", "u32") else 64)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("name", OPS)
def test_launches_are_those_of_triton(
    name: str, sm: int, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    op, units = OPS[name], {80: 108, 90: 132}[sm]
    program, kernels, by_name = fields(name)
    inputs = tensors(op, *sizes)
    asked, form, output = asked_of_triton(op, sm, units, inputs, monkeypatch)
    mock().mock_set(sm, units)
    plugin = Harness.mocked(op.op, program, kernels).attach()
    kinds = [*(kind for kind, _ in op.inputs), *(kind for kind, _ in op.outputs)]
    shapes = [tuple(tensor.shape) for tensor in (*inputs, output)]
    plugin.shapes(kinds, len(inputs), shapes)
    need = form.workspace.value(shapes)
    assert plugin.workspace(kinds, len(inputs), shapes) >= need
    workspace = _workspace_of(asked, [*inputs, output])
    pointers = [*(tensor.data_ptr() for tensor in inputs), output.data_ptr()]
    got = plugin.enqueue(kinds, len(inputs), shapes, pointers, workspace, STREAM)
    if op.aliases:  # the output has memory of its own here, so the cache is copied first
        first, *got = got
        assert first == Copy(output.data_ptr(), inputs[0].data_ptr(), output.nbytes)
    variants = {variant.kernel: variant for variant in form.variants()}
    want = [_expected(it, variants[it.kernel], by_name, sm) for it in asked]
    assert got == want
    plugin.free()


def _workspace_of(asked: Sequence[Asked], known: Sequence[torch.Tensor]) -> int:
    """Address of the memory that torch's path took for its workspace."""
    addresses = {tensor.data_ptr() for tensor in known}
    for it in asked:
        for value in it.values.values():
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in addresses:
                return value.untyped_storage().data_ptr()
    return 0


def _expected(asked: Asked, variant: Variant, kernels: dict[str, BundledKernel], sm: int) -> Launch:
    binary = kernels[kernel_name(variant)].binaries[sm]
    words = tuple(word(asked.values[name], kind) for name, kind in variant.arguments)
    assert asked.values["num_warps"] * 32 <= binary.threads
    constants = dict(variant.constants)
    assert {name: asked.values[name] for name in constants} == constants
    grid = (*asked.grid, 1, 1)[:3]
    opted = binary.shared if binary.shared > 48 * 1024 else 0
    block = (binary.threads, 1, 1)
    return Launch(binary.entry, (grid[0], grid[1], grid[2]), block, binary.shared, opted, STREAM, (*words, 0, 0))


@pytest.mark.parametrize("name", ["cache-d576", "cache-d80-fp32"])
def test_a_cache_in_place_is_not_copied(name: str) -> None:
    op = OPS[name]
    program, kernels, _ = fields(name)
    mock().mock_set(90, 132)
    plugin = Harness.mocked(op.op, program, kernels).attach()
    inputs = tensors(op, 2, 3, 40)
    kinds = [*(kind for kind, _ in op.inputs), op.outputs[0][0]]
    shapes = [tuple(tensor.shape) for tensor in (*inputs, inputs[0])]
    plugin.shapes(kinds, 3, shapes)
    (launch,) = plugin.enqueue(kinds, 3, shapes, [*(it.data_ptr() for it in inputs), inputs[0].data_ptr()], 0)
    assert isinstance(launch, Launch)
    assert launch.words[:3] == tuple(inputs[at].data_ptr() for at in (1, 2, 0))


def test_all_layers_share_their_modules() -> None:
    """61 plugins with the same fields: each kernel is loaded once."""
    program, kernels, by_name = fields("attention-h16-r64-fp16")
    mock().mock_set(80, 108)
    plugins = [Harness.mocked("SparseMLA", program, kernels) for _ in range(61)]
    plugins[0].attach()
    before = mock().mock_modules()
    for plugin in plugins:
        plugin.attach()
    assert mock().mock_modules() == before
    assert read_bundle(plugins[-1].field("kernels")) == by_name
