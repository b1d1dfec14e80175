"""Experts that are loaded when it is their turn: the same numbers as of those that are in memory, one at a time, and planned so."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from quantised import FORMATS, quantise
from saved import captured, opened, saved, tensors
from torch import Tensor

from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.passes.mla_to_dsa import mla_to_dsa, prepare
from mla2dsa.runtime import one_expert
from mla2dsa.runtime.execute import PieceRunner
from mla2dsa.runtime.footprint import Footprints

MOE = ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4", "longcat_flash", "kimi_linear"]


def logits(runner: PieceRunner) -> list[Tensor]:
    sequences = [tensors(families.inputs(*shape)) for shape in ((1, 9, 0), (2, 5, 2))]
    return [outputs[0] for outputs in runner.outputs_of(sequences)]


class Watching:
    """A loader that notes what is asked for."""

    def __init__(self, source: WeightSource) -> None:
        self._load = source.loader(source.capture.program)
        self.whole: list[str] = []
        self.experts: list[tuple[str, int]] = []

    def __call__(self, name: str) -> Tensor:
        self.whole.append(name)
        return self._load(name)

    def expert(self, name: str, number: int) -> Tensor:
        self.experts.append((name, number))
        return self._load.expert(name, number)


@pytest.fixture
def none_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_expert, "MOST_HELD", 0)


@pytest.mark.parametrize("name", MOE)
def test_same_numbers_bit_for_bit(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(saved(name, tmp_path_factory))
    program = source.capture.program
    held = logits(PieceRunner(program, source.loader(program)))
    monkeypatch.setattr(one_expert, "MOST_HELD", 0)
    load = Watching(source)
    one_by_one = logits(PieceRunner(program, load))
    assert all(torch.equal(a, b) for a, b in zip(held, one_by_one, strict=True))
    stacked = [name for name in load.whole if ".experts." in name and "shared" not in name]
    assert load.experts
    assert not stacked


@pytest.mark.parametrize("kind", ["plain", "stacked", "fp8", "int4"])
def test_an_expert_is_read_as_with_all_the_others(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One by one in the files, stacked, in FP8 blocks, in INT4."""
    folder = tmp_path / "model"
    wide = {"moe_intermediate_size": 32} if kind == "int4" else {}  # groups of 32
    name = "mistral4" if kind == "stacked" else "deepseek_v3"
    shutil.copytree(saved(name, tmp_path_factory, **wide), folder)
    if kind in FORMATS:
        quantise(folder, kind)
    checkpoint = Checkpoint.open(folder)
    source = WeightSource(checkpoint, captured(checkpoint.config))
    load = source.loader(source.capture.program)
    stacked = [name for name in source.capture.shapes if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(stacked) >= 2
    assert all((name in checkpoint.tensors) == (kind == "stacked") for name in stacked)
    for name in stacked:
        whole = load(name)
        for number in range(len(whole)):
            assert torch.equal(load.expert(name, number), whole[number])


@pytest.mark.usefixtures("none_held")
def test_only_experts_that_serve_a_token_are_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = opened(saved("deepseek_v3", tmp_path_factory))
    load = Watching(source)
    one = tensors(families.inputs(1, 1, 0))
    next(PieceRunner(source.capture.program, load).outputs_of([one]))
    read = [number for name, number in load.experts if name.endswith("gate_up_proj")]
    assert len(read) == len(set(read)) == 2  # num_experts_per_tok


@pytest.mark.usefixtures("none_held")
def test_a_converted_program_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = opened(saved("deepseek_v3", tmp_path_factory))
    config = IndexerConfig(index_topk=4, index_head_dim=16, index_n_heads=4)
    converted = mla_to_dsa(source.capture.program, config).program
    assert len(PieceRunner(converted).one_by_one) == 2


@pytest.mark.parametrize("most", [None, 0], ids=["in memory", "one by one"])
def test_planned_as_it_runs(most: int | None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """Weights that are counted: all of a layer's, or what one expert takes three times."""
    if most is not None:
        monkeypatch.setattr(one_expert, "MOST_HELD", most)
    source = opened(saved("deepseek_v3", tmp_path_factory))
    (counted,) = Footprints(PieceRunner(source.capture.program)).at(16)
    experts = {name: shape for name, shape in source.capture.shapes.items() if ".mlp.experts." in name}
    every = 4 * sum(torch.Size(shape).numel() for shape in source.capture.shapes.values())
    of_experts = 4 * sum(torch.Size(shape).numel() for shape in experts.values())
    one = 4 * max(torch.Size(shape[1:]).numel() for shape in experts.values())
    tables = counted.weights - every if most is None else counted.weights - (every - of_experts + 3 * one)
    assert 0 <= tables < 1024  # rotary frequencies, which are in no checkpoint


def test_a_loader_of_whole_tensors_gives_whole_tensors(
    tmp_path_factory: pytest.TempPathFactory, none_held: None
) -> None:
    source = opened(saved("deepseek_v3", tmp_path_factory))
    asked: list[str] = []
    load = source.loader(source.capture.program)
    logits(PieceRunner(source.capture.program, lambda name: asked.append(name) or load(name)))  # type: ignore[func-returns-value]
    assert any(name.endswith("experts.gate_up_proj") for name in asked)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9, -1, -4, -9])
def test_the_first_experts_as_a_slice_has_them(count: int) -> None:
    whole = torch.randn(4, 3, 2)
    first = one_expert.OneByOne(tuple(whole.shape), whole.__getitem__).first(count)
    assert first.shape == whole[:count].shape
    assert all(torch.equal(first[number], whole[:count][number]) for number in range(first.shape[0]))


@pytest.mark.usefixtures("none_held")
@pytest.mark.parametrize(("most", "groups"), [(1, 3), (20, 2), (30, 1)], ids=["alone", "two and one", "all"])
def test_an_expert_serves_the_sequences_that_wait_for_it(
    most: int, groups: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read once for a group of sequences of so many tokens, and each gets what it gets alone, in its turn."""
    monkeypatch.setattr(one_expert, "MOST_TOKENS", most)
    source = opened(saved("deepseek_v3", tmp_path_factory))
    program = source.capture.program
    cores = [site.core.out.name for site in prepare(program)[1].sites]
    sequences = [tensors(families.inputs(1, 10, 0, seed=seed)) for seed in range(3)]
    load = Watching(source)
    runner = PieceRunner(program, load, cores)
    found = [outputs[0] for outputs in runner.outputs_of(sequences)]
    plain = PieceRunner(program, source.loader(program).__call__, cores)  # nothing that has `expert`
    for one, wanted in zip(found, plain.outputs_of(sequences), strict=True):
        assert torch.equal(one, wanted[0])
    times = Counter(load.experts)
    assert max(times.values()) <= groups
    assert (sum(times.values()) == len(times)) == (groups == 1)
    seen = [(one.piece, one.sequence) for one in runner.run(sequences, cores)]
    assert seen == [(piece, number) for piece in range(len(cores)) for number in range(3)]


@pytest.mark.usefixtures("none_held")
def test_what_waits_is_planned(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(saved("deepseek_v3", tmp_path_factory))
    peaks = {}
    for tokens in (32, 64, 128):
        monkeypatch.setattr(one_expert, "MOST_TOKENS", tokens)
        peaks[tokens] = Footprints(PieceRunner(source.capture.program)).at(32)[0].peak
    assert peaks[64] - peaks[32] > 2 * 4 * 32 * 64  # the residual stream and what goes into the experts
    assert peaks[128] - peaks[64] == 2 * (peaks[64] - peaks[32])
