"""`--device`: one layer at a time lies on it, what waits lies on the CPU, and the result is the CPU's."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import dense_checkpoint
from command_line import LAYERS, TINY, mla2dsa, small_flags
from fake_device import NAME, Present
from safetensors.torch import load_file
from saved import opened
from torch import Tensor

from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.indexer.calibrate import Calibration, LayerResult, calibrate, layer_samples
from mla2dsa.optimizer.indexer.distil import DistilSchedule
from mla2dsa.optimizer.indexer.layer_fit import Training
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.optimizer.proof.evaluate import on_text
from mla2dsa.runtime.execute import PieceRunner
from mla2dsa.runtime.shelf import Shelf

TOPK, LENGTH = 12, 48
CONFIG = IndexerConfig(index_topk=TOPK, index_n_heads=4, index_head_dim=64)


def text(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randint(3, 128, (count, LENGTH), generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> WeightSource:
    """Three layers, the last two MoE."""
    return opened(dense_checkpoint("moe", tmp_path_factory))


@pytest.fixture
def present() -> Iterator[Present]:
    """The device, and everything that the test does goes through it."""
    with Present() as mode:
        yield mode


def test_the_device_is_held_to_what_it_is(present: Present) -> None:
    there, here = torch.ones(2, 3, device=NAME), torch.ones(3)
    assert (str(there.device), (there @ here.to(NAME)).sum().item()) == (NAME, 6.0)
    with pytest.raises(RuntimeError, match="and on the CPU"):
        there @ here
    before = present.device.bytes
    part = there[:1]
    assert present.device.bytes == before == 24
    del there
    assert present.device.bytes == 24
    del part
    gc.collect()
    assert (present.device.bytes, present.device.peak) == (0, 24 + 12 + 8)  # the product, too


@pytest.mark.parametrize("schedule", [None, DistilSchedule(3)], ids=["closed-form", "distil"])
def test_calibration_on_a_device_is_the_cpus(source: WeightSource, schedule: DistilSchedule | None) -> None:
    how = Calibration(CONFIG, rows=16, training=Training(schedule))
    expected = list(calibrate(source, text(3), text(1, seed=1), how))
    with Present():
        found = list(calibrate(replace(source, device=NAME), text(3), text(1, seed=1), how))
    for a, b in zip(expected, found, strict=True):
        tensors = b.weights.tensors()
        assert {type(tensor) for tensor in tensors.values()} == {Tensor}, "results wait on the CPU"
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in a.weights.tensors().items())
        assert _figures(a) == _figures(b)


def _figures(result: LayerResult) -> dict[str, Any]:
    return result.summary()


def test_text_on_a_device_is_the_cpus(source: WeightSource) -> None:
    program = source.capture.program

    def runner(of: WeightSource) -> PieceRunner:
        return PieceRunner(program, of.loader(program), shelf=Shelf())

    there = replace(source, device=NAME)
    expected = on_text(runner(source), {"same": runner(source)}, text(2), TOPK)
    with Present():
        found = on_text(runner(there), {"same": runner(there)}, text(2), TOPK, NAME)
    assert found == expected


def test_one_layer_is_on_the_device_whatever_waits(source: WeightSource, tmp_path: Path) -> None:
    """The most that lies there does not grow with the sequences, and is less than all weights."""
    peaks = []
    for count in (2, 6):
        with Present() as present:
            layers = layer_samples(
                replace(source, device=NAME), text(count), Calibration(CONFIG, rows=16), shelf=Shelf(tmp_path)
            )
            for _, samples, _ in layers:
                assert all(type(kept._like) is Tensor for sample in samples.shelved for kept in sample.values())
            del layers, samples
        peaks.append(present.device.peak)
        inputs = 8 * (3 * LENGTH + 16)  # of a sequence: ids, mask, positions and rows
        assert present.device.bytes <= count * inputs
    weights = 4 * sum(math.prod(shape) for shape in source.capture.shapes.values())
    assert peaks[1] - peaks[0] <= 4 * inputs
    assert peaks[1] < 0.6 * weights


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_conversion_on_a_gpu(device: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Other kernels round otherwise: the figures are close, and so is what the indexers do."""
    flags = [*small_flags(tmp_path_factory), "--skip-transformers", "--json"]
    reports = {}
    for place in ("cpu", device):
        done = mla2dsa("convert", TINY, tmp_path / place, *flags, "--device", place)
        assert done.code == 0, done.err
        reports[place] = done.json()
    recalls = {place: [layer["recall"] for layer in report["layers"]] for place, report in reports.items()}
    assert recalls[device] == pytest.approx(recalls["cpu"], abs=2e-3)
    shards = [load_file(tmp_path / place / "model-indexer.safetensors") for place in ("cpu", device)]
    assert shards[0].keys() == shards[1].keys()
    assert len(shards[0]) == 5 * len(LAYERS)
    assert torch.cuda.max_memory_allocated() > 0
