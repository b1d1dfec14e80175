"""An indexer that several layers share is fitted to what all of them attend to: on a trained model that is worth a lot of loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from command_line import TINY, training_text
from saved import opened
from tokenizers import Tokenizer
from torch import Tensor

from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer.calibrate import Calibration, calibrate
from mla2dsa.optimizer.indexer.distil import DistilSchedule
from mla2dsa.optimizer.indexer.layer_fit import Training
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.optimizer.proof.losses import mean_loss
from mla2dsa.optimizer.share.programs import sharing_runner
from mla2dsa.runtime.shelf import Shelf

TOPK, LENGTH, FITTED, HELD_OUT, STEPS = 32, 256, 12, 4, 96
CONFIG = IndexerConfig(index_topk=TOPK, index_n_heads=4, index_head_dim=32)
HOW = Calibration(CONFIG, 64, Training(DistilSchedule(STEPS)))


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    text = training_text(tmp_path_factory).read_text()
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids
    return list(torch.tensor(ids[: (FITTED + HELD_OUT) * LENGTH]).view(-1, LENGTH))


@pytest.fixture(scope="module")
def source() -> WeightSource:
    return opened(TINY)


def indexers(
    source: WeightSource, sequences: list[Tensor], shared: tuple[int, ...], how: Calibration
) -> dict[str, IndexerWeights]:
    how = replace(how, config=replace(CONFIG, shared=shared))
    found = calibrate(source, sequences[:FITTED], sequences[FITTED:], how)
    return {one.name: one.weights for one in found}


def loss(
    source: WeightSource, sequences: list[Tensor], shared: tuple[int, ...], weights: dict[str, IndexerWeights]
) -> float:
    runner = sharing_runner(source, weights, replace(CONFIG, shared=shared), False, Shelf())
    return mean_loss(runner, sequences[FITTED:], TOPK)


@pytest.fixture(scope="module")
def alone(source: WeightSource, sequences: list[Tensor]) -> dict[str, IndexerWeights]:
    """Of every layer, fitted for it alone."""
    return indexers(source, sequences, (), HOW)


@pytest.mark.parametrize(
    ("shared", "of_alone"),
    [((1,), 0.2), ((3,), 1.0), ((1, 2), 0.3), ((1, 3), 0.5), ((2, 3), 1.0), ((1, 2, 3), 0.5)],
    ids=str,
)
def test_less_is_lost(
    shared: tuple[int, ...],
    of_alone: float,
    source: WeightSource,
    sequences: list[Tensor],
    alone: dict[str, IndexerWeights],
) -> None:
    """Beside an indexer in every layer: than with the selections of those that were fitted for their own layer."""
    together, every = indexers(source, sequences, shared, HOW), loss(source, sequences, (), alone)
    assert len(together) == 4 - len(shared)
    fitted_for_all, for_one = (loss(source, sequences, shared, weights) - every for weights in (together, alone))
    assert fitted_for_all < of_alone * for_one
