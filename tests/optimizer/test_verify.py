"""`verify`: what holds for an honest pair, and which check fails for every kind of damage."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents, dense_checkpoint, edit_config
from command_line import (
    INDEXER_SHARD,
    LAYERS,
    SMALL_TOPK,
    TINY,
    Done,
    assert_refused,
    mla2dsa,
    quick_capture,  # noqa: F401  (a fixture)
    randomised,
    small_conversion,
    with_indexers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla2dsa.exporters.report.page import page
from mla2dsa.optimizer.proof.evaluate import LayerRecall, TextResult
from mla2dsa.optimizer.proof.figures import Quality
from mla2dsa.optimizer.proof.limits import Measured, quality_checks

pytestmark = pytest.mark.usefixtures("quick_capture")

FLAGS = ("--text", TINY / "held_out", "--sequences", 2, "--sequence-length", 192)
STREAMED = (*FLAGS, "--skip-transformers")
GRAPH = "dense = DSA up to index_topk (graph)"
LOSS, KL = "loss increase on text, nats/token", "KL to the dense model, no more than with a window of the same size"
TABLES = ("oracle top-k", "window + 4 sinks", "scores in FP8", "worst sequence: number 0", "few positive")
WINDOW, CHANCE = (
    "attention mass missed, no more than a window of the same size misses",
    "attention mass missed in a layer, no more than chance misses",
)


@pytest.fixture
def dsa(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shared conversion, for a test to change."""
    return Path(shutil.copytree(small_conversion(tmp_path_factory), tmp_path / "dsa"))


def failed(done: Done) -> dict[str, dict[str, Any]]:
    """The checks that failed, by name; the first is the one in the line on stderr."""
    found = {check["name"]: check for check in done.json()["checks"] if not check["passed"]}
    assert done.code == (1 if found else 0)
    assert done.json()["passed"] is not bool(found)
    if found:
        first = next(iter(found))
        assert done.err.startswith(f"mla2dsa: verification failed: {first}: ")
        assert len(done.err.splitlines()) == 1
        assert "expected at most" in done.err
        assert ";" in done.err
    else:
        assert done.err == ""
    return found


# Honest pairs


def test_honest_pair(tmp_path_factory: pytest.TempPathFactory) -> None:
    dsa = small_conversion(tmp_path_factory)
    before = contents(dsa)
    done = mla2dsa("verify", TINY, dsa, *FLAGS, "--foreign-text", TINY / "corpus.py", "--json")
    assert not failed(done)
    result = done.json()
    values = {check["name"]: check["value"] for check in result["checks"]}
    assert len(values) == 12
    foreign = result["foreign"]
    assert foreign["origin"] == str(TINY / "corpus.py")
    for text in (result["text"], foreign["text"]):
        assert list(text["by_selection"]) == ["dsa", "oracle", "window", "dsa-fp8"]
        assert 0.9 < text["fp8_same_keys"] < 1
        assert text["by_selection"]["dsa"]["worst"]["excerpt"]
    assert all(0 <= layer["few_positive"] <= 1 for layer in result["layers"] + foreign["layers"])
    assert values["dense = DSA up to index_topk (transformers, bit for bit)"] == 0
    assert values["transformers loads it, no key missing or unexpected"] == 0
    assert values[GRAPH] < 1e-5
    assert result["text"]["positions"] == 2 * (192 - SMALL_TOPK - 1)
    assert [layer["name"] for layer in result["layers"]] == list(LAYERS)
    for layer in result["layers"]:
        assert layer["chance"] < layer["window"] < layer["dsa"] <= layer["oracle"]
    assert contents(dsa) == before


def test_tables(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was left out is said, random tokens are called that, and every layer has its line."""
    dsa = small_conversion(tmp_path_factory)
    done = mla2dsa("verify", TINY, dsa, "--sequences", 1, "--sequence-length", 192, "--skip-transformers")
    assert (done.code, done.err) == (0, "")
    assert "not checked: transformers (asked for)" in done.out
    assert "random tokens: dense loss" in done.out
    assert all(part in done.out for part in (*LAYERS, GRAPH, LOSS, KL, *TABLES))
    assert "FAILED" not in done.out


def test_limit_is_the_users(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The page of what failed says so."""
    dsa, drawn = small_conversion(tmp_path_factory), tmp_path / "page.html"
    gates = ("--gate", "kl=0", "--gate", "few-positive=1", "--report", drawn)
    done = mla2dsa("verify", TINY, dsa, *STREAMED, "--max-loss-delta", "1e-9", *gates, "--json")
    assert drawn.read_text() == page(done.json(), "dsa: dense and sparse side by side")
    assert f"<strong>Failed</strong>: {LOSS}" in drawn.read_text()
    assert list(failed(done)) == [LOSS, "KL to the dense model, nats (--gate kl)"]
    assert "expected at most 1e-09 (all layers sparse); calibrate on more text" in done.err


# Damaged indexers


def zeroed(name: str, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor)


def negated(name: str, tensor: Tensor) -> Tensor:
    return -tensor if "weights_proj" in name else tensor


def scrambled(name: str, tensor: Tensor) -> Tensor:
    """The bits of another model's file: right sizes, wrong channels."""
    return tensor[torch.randperm(len(tensor), generator=torch.Generator().manual_seed(1))] if "wk" in name else tensor


@pytest.mark.parametrize("damage", [zeroed, negated, randomised, scrambled], ids=lambda damage: damage.__name__)
def test_damaged_indexers(damage: Callable[[str, Tensor], Tensor], dsa: Path) -> None:
    with_indexers(dsa, damage)
    found = failed(mla2dsa("verify", TINY, dsa, *STREAMED, "--json"))
    assert {LOSS, KL, WINDOW} <= set(found)
    assert GRAPH not in found


@pytest.mark.parametrize("text", [True, False], ids=["text", "random-tokens"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("damage", [zeroed, negated], ids=lambda damage: damage.__name__)
def test_one_damaged_layer_is_named(damage: Callable[[str, Tensor], Tensor], layer: int, text: bool, dsa: Path) -> None:
    """The first layer's attention is so even that the loss hardly shows it; on random tokens it shows nothing at all."""
    with_indexers(dsa, lambda name, tensor: damage(name, tensor) if f"layers.{layer}." in name else tensor)
    found = failed(mla2dsa("verify", TINY, dsa, *(STREAMED if text else STREAMED[2:]), "--json"))
    assert found[CHANCE]["detail"] == LAYERS[layer]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_indexer_that_is_not_finite(value: float, dsa: Path) -> None:
    name = f"{LAYERS[1]}.indexer.wk.weight"
    with_indexers(dsa, lambda n, tensor: torch.full_like(tensor, value) if n == name else tensor)
    assert_refused(mla2dsa("verify", TINY, dsa, *FLAGS), 1, INDEXER_SHARD, f"{name} has ", "NaN or infinite values")


def lose(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / INDEXER_SHARD)
        del tensors[name]
        save_file(tensors, folder / INDEXER_SHARD, metadata={"format": "pt"})
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


WK = f"{LAYERS[1]}.indexer.wk.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], list[object]]] = {
    "tensor-missing": (lose(WK), [f"{WK} is missing", "disagree with config.json"]),
    "other-heads": (lambda f: edit_config(f, {"index_n_heads": 4}), ["wq_b.weight is [1024, 96]", "gives [512, 96]"]),
    "no-topk": (lambda f: edit_config(f, {"index_topk": None}), ["index_topk is None", "positive number"]),
    "topk-zero": (lambda f: edit_config(f, {"index_topk": 0}), ["index_topk is 0", "positive number"]),
    "interleaved": (lambda f: edit_config(f, {"indexer_rope_interleave": True}), ["indexer_rope_interleave is true"]),
    "shard-gone": (lambda f: (f / INDEXER_SHARD).unlink(), [INDEXER_SHARD, "no such file", "fetch the shard"]),
    "no-config": (lambda f: (f / "config.json").unlink(), ["config.json: no such file"]),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_folders_that_are_no_pair(damage: str, dsa: Path) -> None:
    break_it, parts = REFUSED[damage]
    break_it(dsa)
    assert_refused(mla2dsa("verify", TINY, dsa, *FLAGS), 1, *parts)


def test_wrong_order_and_wrong_folders(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    dsa = small_conversion(tmp_path_factory)
    assert_refused(mla2dsa("verify", dsa, TINY), 1, dsa, "has an indexer, expected the dense checkpoint first")
    assert_refused(mla2dsa("verify", TINY, TINY), 1, TINY, "'deepseek_v3' without an indexer", "second")
    assert_refused(mla2dsa("verify", TINY, tmp_path / "no"), 1, tmp_path / "no", "no such folder")
    other = dense_checkpoint("single", tmp_path_factory)
    assert_refused(mla2dsa("verify", other, dsa), 1, dsa / "config.json", "set both alike")


# Dense weights that differ


@pytest.fixture
def other_dense(tmp_path: Path) -> Callable[[str], Path]:
    """The example with one tensor changed a little."""

    def make(name: str) -> Path:
        folder = tmp_path / "dense"
        folder.mkdir()
        shutil.copy(TINY / "config.json", folder / "config.json")
        shutil.copy(TINY / "tokenizer.json", folder / "tokenizer.json")
        shutil.copy(TINY / "tokenizer_config.json", folder / "tokenizer_config.json")
        tensors = load_file(TINY / "model.safetensors")
        tensors[name] = (tensors[name].float() * 1.01).to(tensors[name].dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize(
    ("tensor", "first"),
    [
        ("model.layers.0.self_attn.kv_b_proj.weight", LAYERS[0]),
        ("model.layers.1.mlp.down_proj.weight", LAYERS[2]),
        ("model.layers.3.self_attn.q_b_proj.weight", LAYERS[3]),
        ("lm_head.weight", "outputs"),
    ],
    ids=lambda value: value.rpartition(".")[0],
)
def test_other_dense_weights(
    tensor: str, first: str, other_dense: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The first attention output that the changed tensor reaches is named."""
    if tensor == "lm_head.weight" and "lm_head.weight" not in load_file(TINY / "model.safetensors"):
        tensor = "model.norm.weight"
    done = mla2dsa("verify", other_dense(tensor), small_conversion(tmp_path_factory), *STREAMED, "--json")
    assert failed(done)[GRAPH]["detail"] == f"first differs in {first}"
    assert f"(first differs in {first}); compare with the checkpoint" in done.err


def test_one_number_that_no_text_shows(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One of 16384 numbers of a weight, a little larger: the graph's outputs round it away, the bytes do not."""
    name, dsa = "model.layers.1.mlp.down_proj.weight", small_conversion(tmp_path_factory)
    changed = Path(shutil.copytree(dsa, tmp_path / "dsa"))
    shard = next(file for file in changed.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(shard)
    tensors[name][3, 5] += 1e-3
    shard.unlink()
    save_file(tensors, shard, metadata={"format": "pt"})
    done = mla2dsa("verify", TINY, changed, *STREAMED, "--json")
    assert list(failed(done)) == ["tensors kept = dense's (bytes)"]
    assert f"({name} ({shard}))" in done.err


@pytest.mark.parametrize("limit", ["nan", "inf", "-1", "0"])
def test_limits_that_are_none(limit: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    done = mla2dsa("verify", TINY, small_conversion(tmp_path_factory), *STREAMED, "--max-loss-delta", limit)
    assert_refused(done, 2, "--max-loss-delta", "expected a number above 0")


@pytest.mark.parametrize(
    "fields", [{"rms_norm_eps": 1e-3}, {"routed_scaling_factor": 2.0, "rope_theta": 500.0}], ids=str
)
def test_config_that_says_something_else(fields: Mapping[str, object], dsa: Path) -> None:
    """The weights agree, and the first field that does not is named before anything is computed."""
    config = json.loads((dsa / "config.json").read_text())
    if "rope_parameters" in config and "rope_theta" in fields:
        fields = {"rope_parameters": {**config["rope_parameters"], "rope_theta": 500.0}}
    edit_config(dsa, fields)
    assert_refused(mla2dsa("verify", TINY, dsa, *FLAGS, "--json"), 1, dsa / "config.json", *fields, "set both alike")


# Text


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--sequence-length", 33], 2, ["--sequence-length 33", "index_topk 32", "context of 1024"]),
        (["--sequence-length", 0], 2, ["--sequence-length 0"]),
        (["--sequence-length", 1025], 2, ["--sequence-length 1025", "context of 1024"]),
        (["--gate", "nothing=1"], 2, ["--gate nothing=1", "no such figure"]),
        (["--foreign-text", "/nowhere"], 1, ["/nowhere", "no such file or folder of text"]),
        (["--text", "/nowhere"], 1, ["/nowhere", "no such file or folder of text"]),
        (
            ["--text", TINY / "config.json", "--sequence-length", 1024],
            1,
            ["config.json", "expected at least 1024", "more text"],
        ),
    ],
    ids=["short", "zero", "long", "gate", "no-foreign", "no-text", "little-text"],
)
def test_bad_text(flags: list[object], code: int, parts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    assert_refused(mla2dsa("verify", TINY, small_conversion(tmp_path_factory), *FLAGS, *flags), code, *parts)


def test_no_page_is_overwritten_and_none_is_missed_after_the_work(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsa, mine = small_conversion(tmp_path_factory), tmp_path / "mine.html"
    mine.write_text("mine")
    monkeypatch.setattr("mla2dsa.optimizer.verify.verify_folders", None)
    assert_refused(mla2dsa("verify", TINY, dsa, "--report", mine), 2, mine, "is there already")
    assert mine.read_text() == "mine"
    nowhere = tmp_path / "nowhere" / "page.html"
    assert_refused(mla2dsa("verify", TINY, dsa, "--report", nowhere), 1, nowhere.parent, "no such folder")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(mla2dsa("verify", TINY, dsa, "--report", tmp_path / "page.html"), 2, "pip install 'mla2dsa[report]'")


# The quality checks by themselves


def text_result(loss: float, kl: float, window_kl: float) -> TextResult:
    qualities = {"dsa": Quality(loss, 0.0, kl, 1.0), "window": Quality(0.1, 0.0, window_kl, 1.0)}
    return TextResult(2.0, 10, 64, qualities)


@pytest.mark.parametrize(
    ("loss", "kl", "recalls", "bad"),
    [
        (0.01, 0.01, [(0.9, 0.8), (0.5, 0.6)], []),
        (0.06, 0.01, [(0.9, 0.8), (0.5, 0.6)], [LOSS]),
        (-5.0, 0.30, [(0.9, 0.8), (0.5, 0.6)], [KL]),
        (0.01, 0.01, [(0.6, 0.8), (0.6, 0.5)], [WINDOW]),
        (0.01, 0.01, [(0.9, 0.1), (0.1, 0.2)], [CHANCE]),
        (float("nan"), float("nan"), [(0.9, 0.8), (0.5, 0.6)], [LOSS, KL]),
    ],
    ids=["good", "loss", "kl", "window", "chance", "nan"],
)
def test_quality_limits(loss: float, kl: float, recalls: list[tuple[float, float]], bad: list[str]) -> None:
    layers = [LayerRecall(f"layer{n}", dsa, 1.0, window, 0.2) for n, (dsa, window) in enumerate(recalls)]
    checks = quality_checks(Measured("", text_result(loss, kl, 0.2), tuple(layers)), 0.05)
    assert [check.name for check in checks if not check.passed] == bad
    assert [check.name for check in checks] == [LOSS, KL, WINDOW, CHANCE]
