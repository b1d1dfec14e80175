"""Some layers told otherwise than the rest: what is planned, written, kept by --resume, and refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import (
    INDEXER_SHARD,
    LAYERS,
    TINY,
    assert_refused,
    mla2dsa,
    quick_capture,  # noqa: F401  (a fixture)
)
from safetensors.torch import load_file

from mla2dsa.optimizer.indexer.progress_store import ProgressStore

pytestmark = pytest.mark.usefixtures("quick_capture")

TOLD = {"*.[23].*": {"indexer": "distil", "distil": {"steps": 48, "lr": 0.001}}, "*.2.*": {"distil": {"steps": 24}}}


def smaller(folder: Path, layers: dict[str, Any]) -> list[object]:
    """On random tokens, few of them."""
    file = folder / "told.yaml"
    file.write_text(
        "indexer: closed-form\nindex_topk: 16\nindex_head_dim: 24\nsequence_length: 64\ntokens: 512\nrows: 16\nverify: {sequences: 1}\n"
        f"layers: {json.dumps(layers)}\n"
    )
    return ["--recipe", file, "--skip-verification"]


def test_layers_are_made_as_they_are_told(tmp_path: Path) -> None:
    assert mla2dsa("convert", TINY, tmp_path / "plain", *smaller(tmp_path, {})).code == 0
    done = mla2dsa("convert", TINY, tmp_path / "dsa", *smaller(tmp_path, TOLD), "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert [layer["steps"] for layer in report["layers"]] == [0, 0, 24, 48]
    assert report["recipe"]["layers"] == TOLD
    told = report["plan"]["indexers"]
    assert [one["indexer"] for one in told.values()] == ["closed-form", "closed-form", "distil", "distil"]
    made, others = (load_file(tmp_path / name / INDEXER_SHARD) for name in ("dsa", "plain"))
    assert made.keys() == others.keys()
    same = {layer: all(torch.equal(made[n], others[n]) for n in made if n.startswith(f"{layer}.")) for layer in LAYERS}
    taken = [layer["name"] for layer in report["layers"] if layer["indexer"] == "distilled"]
    assert taken  # or the test shows nothing
    assert [layer for layer in LAYERS if not same[layer]] == taken


def test_plan_says_what_each_is_told(tmp_path: Path) -> None:
    lines = mla2dsa("plan", TINY, *smaller(tmp_path, TOLD)[:2]).out.splitlines()
    assert f"  {LAYERS[0]} .. {LAYERS[1]}: closed-form" in lines
    assert f"  {LAYERS[2]}: distil, at most 24 steps at 0.001" in lines
    assert not [line for line in mla2dsa("plan", TINY).out.splitlines() if line.startswith(f"  {LAYERS[0]}")]


@pytest.mark.parametrize("command", [("plan",), ("convert", "out"), ("convert", "out", "--dry-run")], ids=" ".join)
def test_a_pattern_without_a_layer_is_found_before_work(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("mla2dsa.optimizer.indexers.calibrate", never)
    asked = smaller(tmp_path, {"model.layers.[4-9].*": {"indexer": "distil"}})
    verb, out = command[0], [tmp_path / name if name == "out" else name for name in command[1:]]
    done = mla2dsa(verb, TINY, *out, *(asked if verb == "convert" else asked[:2]))
    assert_refused(done, 2, "'model.layers.[4-9].*' matches no layer", f"as of {LAYERS[0]}")
    assert [path.name for path in tmp_path.iterdir()] == ["told.yaml"]


def test_a_size_of_some_layers_is_refused(tmp_path: Path) -> None:
    done = mla2dsa("convert", TINY, tmp_path / "out", *smaller(tmp_path, {"*.0.*": {"index_topk": 16}}))
    assert_refused(done, 2, "layers.*.0.*.index_topk", "config.json has one index_topk for all layers, in every layout")


# --resume


DISTIL = {"indexer": "distil", "distil": {"steps": 2}}


def budget(steps: int) -> dict[str, Any]:
    return {"indexer": "distil", "budget": f"{steps} steps"}


@pytest.mark.parametrize(
    ("before", "after", "again"),
    [
        pytest.param({"*.[01].*": DISTIL}, {"*.0.*": DISTIL}, [1, 3], id="no longer"),
        pytest.param({"*.0.*": budget(4)}, {"*.[03].*": budget(4)}, [0, 3], id="shared"),  # a smaller share for both
    ],
)
def test_resume_makes_again_what_is_told_otherwise(
    before: dict[str, Any], after: dict[str, Any], again: list[int], tmp_path: Path, fitted: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    save = ProgressStore.save

    def interrupting(self: ProgressStore, result: Any) -> None:
        save(self, result)
        if len(self.layers()) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressStore, "save", interrupting)
        assert mla2dsa("convert", TINY, tmp_path / "dsa", *smaller(tmp_path, before)).code == 130
    fitted.clear()
    changed = smaller(tmp_path, after)
    done = mla2dsa("convert", TINY, tmp_path / "dsa", *changed, "--resume")
    assert done.code == 0, done.err
    assert fitted == [LAYERS[number] for number in again]
    assert mla2dsa("convert", TINY, tmp_path / "whole", *changed).code == 0
    assert (tmp_path / "dsa" / INDEXER_SHARD).read_bytes() == (tmp_path / "whole" / INDEXER_SHARD).read_bytes()
