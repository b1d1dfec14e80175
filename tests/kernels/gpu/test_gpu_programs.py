"""The programs as data: they fit their kernels, their budget and their tensors; the table has a row for each case."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from gpu_cases import FORMS

from mla2dsa.kernels.gpu.dispatch import _launcher
from mla2dsa.kernels.gpu.launch import Launcher
from mla2dsa.kernels.gpu.programs import tuning
from mla2dsa.kernels.gpu.programs.catalogue import FAMILIES, catalogue
from mla2dsa.kernels.gpu.programs.indexer_program import FORMS as INDEXER_FORMS
from mla2dsa.kernels.gpu.programs.indexer_program import IndexerCase
from mla2dsa.kernels.gpu.programs.program import Expr, LaunchProgram, Repeat, Tensor, Workspace
from mla2dsa.kernels.gpu.programs.quantise_program import QuantiseRowsCase
from mla2dsa.kernels.gpu.programs.sparse_program import AttentionCase
from mla2dsa.kernels.gpu.programs.tuning import NoBlocks, blocks
from mla2dsa.kernels.gpu.triton_code.registry import KERNELS, jit_function


def launches(program: LaunchProgram, shapes: list[tuple[int, ...]]) -> list[tuple[object, dict[str, int]]]:
    found = []
    for step in program.steps:
        if isinstance(step, Repeat):
            values = range(0, step.stop.value(shapes), step.step.value(shapes))
            found += [(launch, {step.variable: value}) for value in values for launch in step.launches]
        else:
            found.append((step, {}))
    return found


@pytest.mark.parametrize("sm", FAMILIES)
def test_catalogue_covers_the_usual_models(sm: int) -> None:
    names = catalogue(sm)
    for heads, topk, form in itertools.product((8, 16, 32, 64), (512, 1024, 2048, 4096), INDEXER_FORMS):
        assert f"lightning_indexer.bf16.h{heads}.d128.k{topk}.{form}" in names
        assert (f"lightning_indexer.fp8e4nv.h{heads}.d128.k{topk}.{form}" in names) == (sm >= 89)
    for heads, form in itertools.product((8, 16, 20, 32, 64, 128), FORMS):
        assert f"sparse_mla.bf16.h{heads}.r512.d64.{form}" in names
        assert f"sparse_mla_fp8.bf16.h{heads}.{form}" in names
    assert f"sparse_mla.bf16.h32.r256.d64.{FORMS[0]}" in names


def test_variants_name_the_arguments_of_their_kernels() -> None:
    pytest.importorskip("triton")
    variants = {variant for sm in FAMILIES for program in catalogue(sm).values() for variant in program.variants()}
    assert {variant.kernel for variant in variants} == set(KERNELS)
    for variant in variants:
        parameters = jit_function(variant.kernel).arg_names
        constants = [name for name, _ in variant.constants]
        assert [name for name in parameters if name not in constants] == [name for name, _ in variant.arguments]
        assert set(constants) <= set(parameters)
        assert variant.aligned == {name for name, kind in variant.arguments if kind.startswith("*")}


def test_a_program_is_built_once() -> None:
    launchers = [_launcher(AttentionCase("bf16", 16, 512, 64, 0.1, 90, "decode"), False) for _ in range(2)]
    assert launchers[0] is launchers[1]
    assert launchers[0] is not _launcher(AttentionCase("bf16", 16, 512, 64, 0.2, 90, "decode"), False)


@pytest.mark.parametrize("form", INDEXER_FORMS)
@pytest.mark.parametrize("budget_mb", [64, 512])
@pytest.mark.parametrize(
    ("batch", "queries", "slots"), [(1, 4096, 131072), (1, 1, 1 << 20), (4, 900, 5000), (2, 70000, 3)]
)
def test_indexer_stays_in_its_budget(form: str, budget_mb: int, batch: int, queries: int, slots: int) -> None:
    program = IndexerCase("bf16", 32, 128, 2048, 90, form, budget_mb=budget_mb).program()
    shapes: list[tuple[int, ...]] = [(batch, queries, 32, 128), (batch, slots, 128), (batch, queries, 32)]
    shapes += [(batch, queries)] * 2 + [(batch, queries, min(2048, slots))]
    size = program.workspace.value(shapes)
    assert size <= budget_mb * 2**20 + 2048
    (loop,) = program.steps
    assert isinstance(loop, Repeat)
    rows = loop.step.value(shapes)
    if form != "decode":  # no smaller than it has to be ("decode" leaves room for slices that many rows do not have)
        assert rows == queries or size * 2 > budget_mb * 2**20
    covered = 0
    for launch, env in launches(program, shapes):
        if launch.variant.kernel.startswith("indexer"):  # type: ignore[attr-defined]
            covered += _numbers(launch, shapes, env)["count"]
    assert covered == queries


def _numbers(launch: object, shapes: list[tuple[int, ...]], env: dict[str, int]) -> dict[str, int]:
    pairs = zip(launch.variant.arguments, launch.arguments, strict=True)  # type: ignore[attr-defined]
    return {name: value.value(shapes, env) for (name, _), value in pairs if isinstance(value, Expr)}


@pytest.mark.parametrize("name", [name for name in catalogue(90) if not re.search(r"\.k(512|1024|4096)\.", name)])
def test_pointers_stay_in_the_workspace(name: str) -> None:
    pytest.importorskip("triton")
    program = catalogue(90)[name]
    shapes = _shapes(name)
    shapes += [tuple(size.value([*shapes, ()]) for size in shape) for _, shape in program.outputs]
    size = program.workspace.value(shapes)
    for launch, env in launches(program, shapes):
        assert all(0 <= edge.value(shapes, env) < 2**31 for edge in launch.grid)  # type: ignore[attr-defined]
        for argument in launch.arguments:  # type: ignore[attr-defined]
            if isinstance(argument, Workspace):
                offset = argument.offset.value(shapes, env)
                assert offset % 256 == 0
                assert 0 <= offset < size
            if isinstance(argument, Tensor):
                assert argument.number < len(shapes)


def _shapes(name: str) -> list[tuple[int, ...]]:
    parts = {part[0]: int(part[1:]) for part in name.split(".") if part[0] in "hrdk" and part[1:].isdigit()}
    if name.startswith("lightning_indexer"):
        scale = [(2, 999)] if "fp8" in name else []
        return [(2, 7, parts["h"], 128), (2, 999, 128), *scale, (2, 7, parts["h"]), (2, 7), (2, 7)]
    if name.startswith("sparse_mla_fp8"):
        return [(2, 7, parts["h"], 576), (2, 999, 656), (2, 7, 100)]
    if name.startswith("sparse_mla"):
        width = parts["r"] + parts["d"]
        return [(2, 7, parts["h"], width), (2, 999, width), (2, 7, 100)]
    if name.startswith("cache_write"):
        return [(2, 999, parts["d"]), (2, 7, parts["d"]), (2, 7)]
    return [(9, 128)] if name.startswith("quantise") else [(2, 7, 576)]


@pytest.mark.parametrize(
    ("kernel", "sm", "dtype", "heads", "width", "expected"),
    [
        ("sparse_mla", 90, "bf16", 128, 576, {"BLOCK_H": 64, "BLOCK_K": 64}),
        ("sparse_mla", 90, "fp16", 8, 576, {"BLOCK_H": 16}),
        ("sparse_mla", 103, "bf16", 128, 576, {"BLOCK_H": 64, "BLOCK_K": 32}),  # as 100
        ("sparse_mla", 86, "bf16", 128, 576, {"BLOCK_H": 16, "BLOCK_K": 32}),
        ("sparse_mla", 121, "bf16", 128, 576, {"BLOCK_H": 16}),  # as 120
        ("indexer_prefill", 90, "bf16", 64, 256, {"BLOCK_S": 64}),  # too wide for the row of 128 channels
        ("topk_row", 0, "fp32", 0, 0, {"BLOCK": 128}),
    ],
)
def test_table_gives_the_nearest_older_architecture(
    kernel: str, sm: int, dtype: str, heads: int, width: int, expected: dict[str, int]
) -> None:
    assert expected.items() <= blocks(kernel, sm, dtype, heads, width).items()


def test_table_refuses_what_does_not_fit() -> None:
    with pytest.raises(
        NoBlocks, match="no block sizes for indexer_decode on sm_86 with fp32, 128 heads and 256 channels"
    ):
        blocks("indexer_decode", 86, "fp32", 128, 256)
    with pytest.raises(NoBlocks, match="sm_75"):
        blocks("topk_row", 75)


def test_table_knows_every_kernel_and_nothing_else() -> None:
    assert set(tuning.table()) == set(KERNELS)


def test_runner_refuses_other_tensors() -> None:
    runner = Launcher(QuantiseRowsCase("bf16", 8, False, 0).program(), interpret=True)
    with pytest.raises(ValueError, match="takes 1 tensors, got 2"):
        runner(torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="input 0 of the program must be contiguous and torch"):
        runner(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="contiguous"):
        runner(torch.zeros(8, 2, dtype=torch.bfloat16).T)


def test_runner_refuses_more_than_a_launch_can_have() -> None:
    pytest.importorskip("triton")
    runner = Launcher(IndexerCase("bf16", 1, 32, 4, 90, "batch", bounds="i32").program())
    with pytest.raises(ValueError, match=r"indexer_decode would need \(1, 1, 70000\) programs .* too many"):
        runner._plan(((70000, 1, 1, 32), (70000, 8, 32), (70000, 1, 1), (70000, 1), (70000, 1)))


def test_runner_refuses_sizes_beyond_32_bits() -> None:
    pytest.importorskip("triton")
    runner = Launcher(AttentionCase("bf16", 1, 16, 0, 1.0, 90, "prefill").program())
    with pytest.raises(ValueError, match="S is 2147483648 for tensors of shape"):
        runner._plan(((1, 1, 1, 16), (1, 1 << 31, 16), (1, 1, 4)))
