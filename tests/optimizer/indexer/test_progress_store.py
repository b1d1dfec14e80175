"""Layers kept for --resume: each says which conversion it is of, and none of another is ever taken."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mla2dsa.errors import UsageError, UserError
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer.calibrate import LayerResult
from mla2dsa.optimizer.indexer.progress_store import ProgressStore

NAMES = FIRST, SECOND, THIRD = tuple(f"model.layers.{number}.self_attn" for number in range(3))
A, B = dict.fromkeys(NAMES, "A"), dict.fromkeys(NAMES, "B")


def result(name: str, value: float) -> LayerResult:
    shapes = IndexerWeights.shapes(IndexerConfig(index_topk=64, index_n_heads=2, index_head_dim=32), 16, 8)
    weights = IndexerWeights.from_tensors({key: torch.full(shape, value) for key, shape in shapes.items()})
    return LayerResult(weights, "distilled", "why", 0.1, 0.2, 0.3, 0.1, 0.0, 12, 3.5, {}, name)


def values(store: ProgressStore) -> dict[str, float]:
    return {name: float(layer.weights.wk[0, 0]) for name, layer in store.load().items()}


def test_layers_come_back(tmp_path: Path) -> None:
    store = ProgressStore.open(tmp_path / "out", A, False, False)
    store.save(result(FIRST, 1))
    store.save(result(FIRST, 2))
    store.save(result(SECOND, 3))
    again = ProgressStore.open(tmp_path / "out", A, True, False)
    assert values(again) == {FIRST: 2, SECOND: 3}
    assert again.load()[SECOND].summary() == result(SECOND, 3).summary()
    assert {file.suffix for file in store.folder.iterdir()} == {".safetensors"}
    store.remove()
    assert not list(tmp_path.iterdir())


def test_one_that_others_share_is_another(tmp_path: Path) -> None:
    store = ProgressStore.open(tmp_path / "out", A, False, False)
    for serves in range(3):
        store.save(replace(result(FIRST, serves), serves=serves))
    again = ProgressStore.open(tmp_path / "out", A, True, False)
    assert values(again) == {FIRST: 0, f"{FIRST}+1": 1, f"{FIRST}+2": 2}
    assert all(layer.key == key for key, layer in again.load().items())
    assert len(again.finished()) == 3


def test_two_runs_do_not_mix(tmp_path: Path) -> None:
    """Should the lock ever fail: A is going on, B starts there with --overwrite, and A's next layers land in B's store."""
    a = ProgressStore.open(tmp_path / "out", A, False, False)
    a.save(result(FIRST, 1))
    b = ProgressStore.open(tmp_path / "out", B, False, True)
    b.save(result(FIRST, 2))
    a.save(result(SECOND, 1))
    a.save(result(THIRD, 1))
    resumed = ProgressStore.open(tmp_path / "out", B, True, False)
    assert values(resumed) == {FIRST: 2}
    resumed.save(result(SECOND, 2))
    assert values(resumed) == {FIRST: 2, SECOND: 2}


@pytest.mark.parametrize("overwrite", [False, True])
def test_all_of_another(overwrite: bool, tmp_path: Path) -> None:
    """With both --resume and --overwrite (as deploy has it): this one's are gone on with, another's given up."""
    ProgressStore.open(tmp_path / "out", A, False, False).save(result(FIRST, 1))
    if not overwrite:
        with pytest.raises(UsageError, match="another model, recipe or text; pass --overwrite to start again"):
            ProgressStore.open(tmp_path / "out", B, True, False)
        assert values(ProgressStore.open(tmp_path / "out", A, True, True)) == {FIRST: 1}
        return
    assert values(ProgressStore.open(tmp_path / "out", B, True, True)) == {}
    assert not list((tmp_path / ".out.mla2dsa-layers").iterdir())


def test_what_changed_for_some_layers_is_of_those(tmp_path: Path) -> None:
    """They count for nothing, and stay until they are made again: the old recipe may come back."""
    store = ProgressStore.open(tmp_path / "out", A, False, False)
    store.save(result(FIRST, 1))
    store.save(result(SECOND, 1))
    mixed = ProgressStore.open(tmp_path / "out", {**A, FIRST: "B"}, True, False)
    assert (values(mixed), len(mixed.layers()), len(mixed.finished())) == ({SECOND: 1}, 2, 1)
    assert values(ProgressStore.open(tmp_path / "out", A, True, False)) == {FIRST: 1, SECOND: 1}
    mixed.save(result(FIRST, 2))
    assert values(mixed) == {FIRST: 2, SECOND: 1}
    assert values(ProgressStore.open(tmp_path / "out", A, True, False)) == {SECOND: 1}


@pytest.mark.parametrize("kind", ["no-fingerprint", "no-metadata", "cut", "text", "link-to-nowhere"])
def test_files_that_are_no_layer(kind: str, tmp_path: Path) -> None:
    store = ProgressStore.open(tmp_path / "out", A, False, False)
    store.save(result(FIRST, 1))
    file = store.folder / f"{SECOND}.safetensors"
    match kind:
        case "no-fingerprint":
            save_file({"x": torch.zeros(1)}, file, {"result": "{}"})
        case "no-metadata":
            save_file({"x": torch.zeros(1)}, file)
        case "cut":
            file.write_bytes((store.folder / f"{FIRST}.safetensors").read_bytes()[:-7])
        case "text":
            file.write_text("mine")
        case "link-to-nowhere":
            file.symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"{SECOND}\.safetensors: damaged .* remove it"):
        ProgressStore.open(tmp_path / "out", A, True, False)


@pytest.mark.parametrize("kind", ["hard-link", "link"])
def test_saving_writes_through_no_link(kind: str, tmp_path: Path) -> None:
    store = ProgressStore.open(tmp_path / "out", A, False, False)
    (tmp_path / "precious").write_text("mine")
    file = store.folder / f"{FIRST}.safetensors"
    os.link(tmp_path / "precious", file) if kind == "hard-link" else file.symlink_to(tmp_path / "precious")
    store.save(result(FIRST, 1))
    assert (tmp_path / "precious").read_text() == "mine"
    assert values(store) == {FIRST: 1}


def test_a_save_that_was_killed_leaves_nothing(tmp_path: Path) -> None:
    store = ProgressStore.open(tmp_path / "out", A, False, False)
    half = store.folder / ".mla2dsa-partial-01234567"
    (half / "in").mkdir(parents=True)
    (half / "in" / "content").write_text("half")
    (half / "lock").touch()
    store.save(result(FIRST, 1))
    assert [file.name for file in store.folder.iterdir()] == [f"{FIRST}.safetensors"]
