"""Every launch of the plugin is the one that Triton's own launcher is asked for: kernel, grid, block, shared memory, arguments.

What Triton gets is written down by a stand-in for the compiled kernel in `Launcher`, which serves torch; the plugin's, by a
stand-in for the CUDA driver. Both have the same tensors, so pointers can be compared as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from plugin_harness import Copy, Harness, Launch, mock

from mla2dsa.kernels.gpu import launch as triton_launch
from mla2dsa.kernels.gpu.binaries.bundle import BundledKernel, bundled, read_bundle, write_bundle
from mla2dsa.kernels.gpu.binaries.cache import compile_cached
from mla2dsa.kernels.gpu.binaries.manifest import kernel_name
from mla2dsa.kernels.gpu.launch import DTYPES, Launcher
from mla2dsa.kernels.gpu.programs.op_program import OpProgram, op_program, spec_of
from mla2dsa.kernels.gpu.programs.plugin_text import write_op
from mla2dsa.kernels.gpu.programs.program import Variant

pytest.importorskip("triton")
OPEN = (None, None)
STREAM = 0x5EA4


def indexer(
    heads: int, width: int, topk: int, kind: str = "bf16", weights: str = "fp32", bounds: str = "i64"
) -> OpProgram:
    shapes = ((*OPEN, heads, width), (*OPEN, width), (*OPEN, heads), OPEN, OPEN)
    return op_program(
        spec_of("LightningIndexer"), (kind, kind, weights, bounds, bounds), shapes, {"topk": topk}, (80, 90)
    )


def attention(heads: int, rank: int, rope: int, kind: str = "bf16") -> OpProgram:
    shapes = ((*OPEN, heads, rank + rope), (*OPEN, rank + rope), (*OPEN, None))
    attributes = {"scale": 0.1147, "kv_lora_rank": rank}
    return op_program(spec_of("SparseMLA"), (kind, kind, "i32"), shapes, attributes, (80, 90))


def cache_write_of(width: int, sms: Sequence[int], kind: str = "bf16", slots: str = "i64") -> OpProgram:
    return op_program(spec_of("CacheWrite"), (kind, kind, slots), ((*OPEN, width), (*OPEN, width), OPEN), {}, sms)


OPS = {
    "indexer-h64-d128-k2048": indexer(64, 128, 2048),
    "indexer-h8-d128-k64": indexer(8, 128, 64, weights="bf16", bounds="i32"),
    "indexer-h16-d32-k8-fp32": indexer(16, 32, 8, "fp32"),
    "attention-h128-r512": attention(128, 512, 64),
    "attention-h16-r64-fp16": attention(16, 64, 16, "fp16"),
    "cache-d576": cache_write_of(576, (80, 90)),
    "cache-d80-fp32": cache_write_of(80, (80, 90), "fp32", "i32"),
}
# (batch, queries, slots)
SIZES = [
    (1, 1, 1),
    (1, 1, 70_000),
    (2, 1, 4097),
    (140, 1, 300),
    (1, 7, 2048),
    (1, 512, 512),
    (3, 600, 5000),
    (1, 2048, 40_000),
]


@cache
def fields(name: str) -> tuple[bytes, bytes, dict[str, BundledKernel]]:
    op = OPS[name]
    made: dict[Variant, dict[int, Any]] = {}
    for variant, sm in op.binaries():
        made.setdefault(variant, {})[sm] = compile_cached(variant, sm)
    kernels = {kernel_name(variant): bundled(variant, by_sm) for variant, by_sm in made.items()}
    return write_op(op, kernel_name).encode(), write_bundle(kernels), kernels


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


def tensors(op: OpProgram, batch: int, queries: int, slots: int) -> list[torch.Tensor]:
    sizes: dict[str, Any] = {"B": batch, "T": queries, "S": slots, "C": slots, "K": min(2048, slots)}
    spec = spec_of(op.op)
    made = []
    for (kind, rules), operand in zip(op.inputs, spec.inputs, strict=True):
        shape = [
            int(rule.args[0]) if rule is not None and rule.op == "int" else sizes[letter]  # type: ignore[arg-type]
            for rule, letter in zip(rules, operand.dims, strict=True)
        ]
        made.append(torch.empty(shape, dtype=DTYPES[kind]))  # nobody reads them
    return made


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
