"""Files of a source whose names our own files need are refused before work, and the source is what it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoints import assert_one_line, contents, dense_checkpoint, random_indexers, save_dense
from command_line import TINY, assert_refused, mla2dsa

from mla2dsa.errors import UserError
from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.files.ownership import why_not_ours
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer import export as exporting
from mla2dsa.optimizer.export import export

INDEXER = IndexerConfig(index_topk=16, index_n_heads=4, index_head_dim=32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("collisions")
    save_dense(place / "dense", num_hidden_layers=1, first_k_dense_replace=1)
    weights = random_indexers(place / "dense", INDEXER)
    return write_dsa_checkpoint(place / "dense", place / "dsa", weights, INDEXER, manifest={})


@pytest.fixture
def dsa(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "dsa"))


def rename_shard(folder: Path, name: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model-dense.safetensors").rename(folder / name)
    index["weight_map"] = {k: name if v == "model-dense.safetensors" else v for k, v in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["model.onnx", "mla2dsa-export.json", "model.data", "Model.ONNX"])
def test_shards_called_like_an_exports_files(name: str, dsa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename_shard(dsa, name)
    before = contents(dsa)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "open_cached", lambda *_: pytest.fail("work was begun"))
        with pytest.raises(UserError) as error:
            export(dsa, dsa.parent / "onnx", max_seq=64)
    assert_one_line(error, dsa / name, "the output needs the name", "rename it")
    assert contents(dsa) == before
    assert [path.name for path in dsa.parent.iterdir()] == ["dsa"]


def test_weights_that_are_copied_may_have_any_name(dsa: Path) -> None:
    rename_shard(dsa, "mla2dsa-export.json")
    before = contents(dsa)
    export(dsa, dsa.parent / "onnx", max_seq=64, copy_weights=True)
    assert contents(dsa) == before


def test_a_shard_called_like_a_tokenizer(dsa: Path) -> None:
    """It is placed once, as what it is."""
    rename_shard(dsa, "tokenizer-weights.safetensors")
    before = contents(dsa)
    out = export(dsa, dsa.parent / "onnx", max_seq=64).folder
    assert contents(dsa) == before
    assert why_not_ours(out) is None


@pytest.mark.parametrize("written", ["model.onnx", "mla2dsa-export.json"])
def test_even_a_name_that_nobody_checks_is_not_written_through(
    written: str, dsa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second line of defence: every file is opened as a new one."""
    rename_shard(dsa, written)
    before = contents(dsa)
    monkeypatch.setattr(exporting, "refuse_names", lambda *_: None)
    with pytest.raises(UserError, match="File exists"):
        export(dsa, dsa.parent / "onnx", max_seq=64)
    assert contents(dsa) == before
    assert [path.name for path in dsa.parent.iterdir()] == ["dsa"]


@pytest.mark.parametrize(
    "name",
    [
        "report.json",
        "report.html",
        "REPORT.JSON",
        "model-indexer.safetensors",
        "mla2dsa.json",
        "config.unproven.json",
        "report.json/x.txt",
    ],
)
def test_sources_with_files_called_like_a_conversions(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(dense_checkpoint("single", tmp_path_factory), tmp_path / "dense"))
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("mine")
    before = contents(source)
    monkeypatch.setattr("mla2dsa.optimizer.plan.capture", lambda *_: pytest.fail("work was begun"))
    for more in ((), ("--dry-run",), ("--overwrite",)):
        done = mla2dsa("convert", source, tmp_path / "out", "--index-topk", 32, "--tokens", 1024, *more)
        assert_refused(done, 1, source / Path(name).parts[0], "for a file of its own; rename it")
    assert contents(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_donor_is_not_replaced_by_what_it_gives(dsa: Path) -> None:
    before = contents(dsa)
    done = mla2dsa("convert", TINY, dsa, "--indexer", f"donor:{dsa}", "--overwrite")
    assert_refused(done, 2, dsa, "same folder")
    assert contents(dsa) == before


def test_configs_and_tokenizers_are_copies(dsa: Path) -> None:
    """Whatever is edited in an export is edited there alone."""
    before = contents(dsa)
    out = export(dsa, dsa.parent / "onnx", max_seq=64).folder
    for file in (path for path in out.rglob("*") if path.is_file()):
        linked = file.stat().st_nlink > 1
        assert linked == (file.suffix == ".safetensors"), file.name
        if not linked:
            file.write_text("edited")
    assert os.path.samefile(out / "model-indexer.safetensors", dsa / "model-indexer.safetensors")
    assert contents(dsa) == before
