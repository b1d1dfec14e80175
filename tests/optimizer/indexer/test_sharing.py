"""Layers in turn: each is worked on once, by one process, on the samples of all sequences in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from threads import Threads, own
from torch import Tensor

from mla2dsa.optimizer.indexer import sharing
from mla2dsa.optimizer.indexer.samples import ShelvedSamples, SiteSample
from mla2dsa.optimizer.indexer.sharing import by_layer
from mla2dsa.runtime.shelf import Shelf

Seen = tuple[str, int, list[list[float]]]


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "processes", own)


def tensors(layer: int, sequence: int) -> dict[str, Tensor]:
    """A field without elements, as a model without rotary tables has, and widths that differ by layer and by sequence."""
    made = {
        field.name: torch.full((2 + sequence, 1 + layer), 100.0 * layer + 10 * sequence + number)
        for number, field in enumerate(fields(SiteSample))
    }
    return {**made, "cos": torch.empty(3, 0), "rows": torch.arange(4) + sequence}


def streamed(layers: int, numbers: Sequence[int], shelf: Shelf, left: list[ShelvedSamples]) -> Iterator[Any]:
    for layer in range(layers):
        kept = [{name: shelf.put(tensor) for name, tensor in tensors(layer, number).items()} for number in numbers]
        left.append(ShelvedSamples(kept))
        yield SimpleNamespace(name=f"layer {layer}"), left[-1], lambda layer=layer, samples=None: layer


@pytest.mark.parametrize("budget", [0, 2**20], ids=["files", "memory"])
@pytest.mark.parametrize(
    ("count", "layers", "sequences"), [(1, 3, 2), (2, 4, 3), (3, 4, 7), (4, 2, 2)], ids=lambda number: str(number)
)
def test_every_layer_is_worked_on_once_with_all_sequences(
    count: int, layers: int, sequences: int, budget: int, tmp_path: Path
) -> None:
    def work(site: Any, samples: Sequence[SiteSample], maps: Any) -> Seen:
        flat = [[float(tensor.double().sum()) for tensor in vars(sample).values()] for sample in samples]
        assert maps(samples=samples) == int(site.name[-1])
        return site.name, own().rank, flat

    def everything() -> tuple[list[Seen], list[ShelvedSamples]]:
        shelf, left = Shelf(tmp_path, budget), list[ShelvedSamples]()
        return list(by_layer(streamed(layers, own().own(sequences), shelf, left), work, shelf)), left

    expected = [
        (
            f"layer {layer}",
            layer % count,
            [[float(t.double().sum()) for t in tensors(layer, number).values()] for number in range(sequences)],
        )
        for layer in range(layers)
    ]
    for found, left in Threads(count).run(everything):
        assert found == expected
        assert not any(kept for samples in left for kept in samples.shelved)  # in nobody's way any more


def test_layers_that_are_done_are_not_sent(tmp_path: Path) -> None:
    def work(site: Any, samples: Sequence[SiteSample], maps: Any) -> tuple[str, int]:
        return site.name, len(samples)

    def everything() -> list[tuple[str, int]]:
        shelf = Shelf(tmp_path)
        return list(by_layer(streamed(3, own().own(4), shelf, []), work, shelf, {"layer 1"}))

    assert Threads(2).run(everything) == [[("layer 0", 4), ("layer 1", 0), ("layer 2", 4)]] * 2


def test_layers_in_turn_know_what_became_of_those_before(tmp_path: Path) -> None:
    def everything() -> list[int]:
        shelf, taken = Shelf(tmp_path), list[int]()
        layers = streamed(5, own().own(3), shelf, [])
        for found in by_layer(layers, lambda *_: sum(taken) + 1, shelf, in_turn=True):
            taken.append(found)
        return taken

    assert Threads(2).run(everything) == [[1, 2, 4, 8, 16]] * 2
