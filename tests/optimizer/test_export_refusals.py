"""What `export` refuses, each with one line that says what to do, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import assert_one_line, edit_config, random_indexers, save_dense

from mla2dsa.errors import UsageError, UserError
from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.export import export
from mla2dsa.optimizer.model.cached_model import dense_config
from mla2dsa.optimizer.model.checkpoint import Checkpoint

INDEXER = IndexerConfig(index_topk=16, index_n_heads=4, index_head_dim=32)


@pytest.fixture(scope="module")
def dsa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("refusals")
    save_dense(place / "dense", num_hidden_layers=1, first_k_dense_replace=1)
    weights = random_indexers(place / "dense", INDEXER)
    return write_dsa_checkpoint(place / "dense", place / "dsa", weights, INDEXER, manifest={})


@pytest.fixture
def native(dsa: Path, tmp_path: Path) -> Path:
    """A deepseek_v32 checkpoint that mla2dsa did not write; tests may damage it."""
    return Path(shutil.copytree(dsa, tmp_path / "native", ignore=shutil.ignore_patterns("mla2dsa*")))


def refused(error: type[UserError], source: Path, out: Path, *parts: object, **options: Any) -> None:
    with pytest.raises(error) as caught:
        export(source, out, **options)
    assert_one_line(caught, *parts)
    assert type(caught.value) is error
    assert not list(out.parent.glob(f".{out.name}.*"))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"format": "engine"}, ("engine", "onnx, pt2")),
        ({"dtype": "int8"}, ("int8", "float32, float16, bfloat16")),
        ({"max_batch": 0}, ("max_batch 0", "at least 1")),
        ({"max_seq": 0}, ("max_seq 0", "at least 1")),
        ({"max_seq": 257}, ("max_seq 257", "256")),
    ],
    ids=["format", "dtype", "max_batch", "max_seq-0", "max_seq-over-context"],
)
def test_values_it_does_not_take(dsa: Path, tmp_path: Path, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(UsageError, dsa, tmp_path / "out", *parts, **options)
    assert not (tmp_path / "out").exists()


def test_out_in_the_way(dsa: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    refused(UsageError, dsa, taken, taken, "--overwrite")
    refused(UsageError, dsa, taken, "holds no manifest of mla2dsa", overwrite=True)
    refused(UsageError, dsa, dsa, "same folder")
    refused(UsageError, dsa, dsa / "inside", "inside one another")
    assert (taken / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_an_export(dsa: Path, tmp_path: Path) -> None:
    done = export(dsa, tmp_path / "out", dtype="float16")
    assert done.manifest["dtype"] == "float16"
    refused(UsageError, dsa, tmp_path / "out", "not empty")
    again = export(dsa, tmp_path / "out", max_seq=100, overwrite=True)
    kept = json.loads((tmp_path / "out" / "mla2dsa-export.json").read_text())
    assert kept == json.loads(json.dumps(again.manifest))
    assert (kept["dtype"], kept["limits"]) == ("float32", {"max_batch": 1, "max_seq": 100})


def test_dense_checkpoint(dsa: Path, tmp_path: Path) -> None:
    refused(UserError, dsa.parent / "dense", tmp_path / "out", "dense checkpoint", "mla2dsa convert")


def test_another_family_without_manifest(native: Path, tmp_path: Path) -> None:
    edit_config(native, {"model_type": "nobody"})
    refused(UserError, native, tmp_path / "out", "nobody", "transformers")


@pytest.mark.parametrize("field", ["index_topk", "index_n_heads", "index_head_dim"])
def test_indexer_size_is_missing(native: Path, tmp_path: Path, field: str) -> None:
    edit_config(native, {field: None})
    refused(UserError, native, tmp_path / "out", field, "None", "config.json")


def test_indexer_size_is_wrong(native: Path, tmp_path: Path) -> None:
    edit_config(native, {"index_n_heads": 8})
    refused(UserError, native, tmp_path / "out", "disagree with config.json", "indexer.wq_b.weight")


def test_dense_layers_after_sparse_ones(native: Path, tmp_path: Path) -> None:
    edit_config(native, {"num_hidden_layers": 2, "mlp_layer_types": ["sparse", "dense"]})
    refused(UserError, native, tmp_path / "out", "mlp_layer_types")


def test_damaged_manifest(dsa: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(dsa, tmp_path / "broken"))
    (broken / "mla2dsa.json").write_text('{"source": 3}')
    refused(UserError, broken, tmp_path / "out", "mla2dsa.json", "damaged")


def test_dense_config_of_a_native_checkpoint(dsa: Path, native: Path) -> None:
    """The same whether mla2dsa wrote the checkpoint or not, and but for what only deepseek_v32 has that of the dense one."""
    told, source = dense_config(Checkpoint.open(native)), json.loads((dsa.parent / "dense" / "config.json").read_text())
    assert told == dense_config(Checkpoint.open(dsa))
    assert told["model_type"] == source["model_type"] == "deepseek_v3"
    del source["num_nextn_predict_layers"]  # of which none are stored
    assert {name: told[name] for name in source} == source
    assert not {name for name in told if "index" in name}
