"""What `convert` writes: files, report, the same bytes every time, donors, and how well it does on held-out text."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents, edit_config
from command_line import (
    INDEXER_SHARD,
    LAYERS,
    SMALL_TOPK,
    TINY,
    assert_refused,
    mla2dsa,
    quick_capture,  # noqa: F401  (a fixture)
    randomised,
    small_conversion,
    small_flags,
    training_text,
    with_indexers,
)
from safetensors.torch import load_file
from torch import Tensor

from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer.indexer_math import index_scores
from mla2dsa.optimizer.indexer.samples import SiteSample

pytestmark = pytest.mark.usefixtures("quick_capture")

ROPE, WIDTH, HEADS = 16, 128, 8
CALIBRATION_BYTES = 300_000


def read(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_text())
    assert isinstance(value, dict)
    return value


# The folder


def test_dense_weights_are_the_same_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    dsa = small_conversion(tmp_path_factory)
    dense, linked = TINY / "model.safetensors", dsa / "model-dense.safetensors"
    if dense.stat().st_dev == linked.stat().st_dev:
        assert dense.stat().st_ino == linked.stat().st_ino
    assert contents(TINY)["model.safetensors"] == contents(dsa)["model-dense.safetensors"]


def test_config_and_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    dsa = small_conversion(tmp_path_factory)
    config, dense = read(dsa / "config.json"), read(TINY / "config.json")
    assert config["model_type"] == "deepseek_v32"
    assert (config["index_topk"], config["index_n_heads"], config["index_head_dim"]) == (SMALL_TOPK, HEADS, WIDTH)
    assert all(config[name] == dense[name] for name in ("hidden_size", "kv_lora_rank", "num_hidden_layers"))
    weight_map = read(dsa / "model.safetensors.index.json")["weight_map"]
    added = {name for name, file in weight_map.items() if file == INDEXER_SHARD}
    assert added == {
        f"{layer}.indexer.{name}" for layer in LAYERS for name in IndexerWeights.shapes(TINY_INDEXER, 1, 1)
    }
    assert not [path.name for path in dsa.iterdir() if path.name.startswith((".", "config.unproven"))]
    assert {path.name for path in dsa.parent.iterdir()} == {"dsa", "stdout.json", "stderr.txt"}


TINY_INDEXER = IndexerConfig(SMALL_TOPK, HEADS, WIDTH)


def test_transformers_loads_it_whole(tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import DeepseekV32ForCausalLM

    dsa = small_conversion(tmp_path_factory)
    model, info = DeepseekV32ForCausalLM.from_pretrained(dsa, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    written = load_file(dsa / INDEXER_SHARD)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in written.items())


def test_report_holds_plan_layers_and_proof(tmp_path_factory: pytest.TempPathFactory) -> None:
    dsa = small_conversion(tmp_path_factory)
    report = read(dsa / "report.json")
    assert [layer["name"] for layer in report["plan"]["layers"]] == list(LAYERS)
    assert [layer["name"] for layer in report["layers"]] == list(LAYERS)
    for layer in report["layers"]:
        assert layer["window"] < layer["recall"] <= layer["oracle"] < 1
        assert (layer["steps"], layer["recall"]) == (0, layer["closed_form_recall"])
    used = report["calibration"]
    assert (used["sequences"], used["sequence_length"], used["tokens"]) == (12, 192, 2304)
    assert used["text"] == str(training_text(tmp_path_factory))
    proof = report["verification"]
    assert proof["passed"] is True
    assert len(proof["checks"]) == 10
    assert all(check["passed"] for check in proof["checks"])
    assert set(proof["text"]["by_selection"]) == {"dsa", "oracle", "window"}
    manifest = read(dsa / "mla2dsa.json")
    assert (manifest["model"], manifest["verified"], manifest["report"]) == (str(TINY), True, report)
    assert manifest["recipe"]["index_topk"] == SMALL_TOPK


def test_proof_is_never_calibrated_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    from mla2dsa.optimizer.before.cuts import cut_text
    from mla2dsa.optimizer.plan import prepare
    from mla2dsa.optimizer.recipe import read_recipe

    _, recipe_file, _, topk, _, text = small_flags(tmp_path_factory)
    recipe = read_recipe(str(recipe_file), {"index_topk": topk, "calibration": str(text)})
    cut = cut_text(prepare(str(TINY), recipe), recipe, False)
    parts = [{tuple(s.tolist()) for s in part} for part in (cut.calibration, cut.beside, cut.selection, cut.proof)]
    assert [len(part) for part in parts] == [
        12,
        4,
        5,
        2,
    ]  # a quarter of what is fitted on is random, and one of those that decide
    assert len(set.union(*parts)) == 23
    length = len(cut.proof[0])
    seen = torch.cat(cut.vocabulary).bincount(minlength=1024)
    assert len(cut.vocabulary) == min(16, -(-1024 // length))
    assert set(seen.tolist()) <= {1, 2}  # every token, and nearly as often as any other
    assert cut.selection[-1] is cut.vocabulary[0]


def test_folder_is_no_checkpoint_until_it_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the time of the proof all weights are there, but nothing that a runtime would load."""
    seen: list[set[str]] = []

    def look(checkpoint: Path, folder: Path, *arguments: Any, **named: Any) -> Any:
        seen.append({path.name for path in folder.iterdir()})
        raise KeyboardInterrupt

    monkeypatch.setattr("mla2dsa.optimizer.convert.open_pair", look)
    done = mla2dsa("convert", TINY, tmp_path / "dsa", "--index-topk", 32, "--tokens", 1024, "--skip-transformers")
    assert_refused(done, 130, "interrupted", "4 finished indexers are kept")
    assert len(seen) == 1
    assert {INDEXER_SHARD, "model-dense.safetensors", "config.unproven.json"} <= seen[0]
    assert not seen[0] & {"config.json", "mla2dsa.json", "report.json"}
    assert [path.name for path in tmp_path.iterdir()] == [".dsa.mla2dsa-layers"]


# The same again


def test_conversion_is_reproducible_and_overwrites(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first, out = small_conversion(tmp_path_factory), tmp_path / "dsa"
    shutil.copytree(first, out)
    (out / INDEXER_SHARD).write_bytes(b"old")
    flags = small_flags(tmp_path_factory)
    assert_refused(mla2dsa("convert", TINY, out, *flags), 2, out, "not empty", "--overwrite")
    done = mla2dsa("convert", TINY, out, *flags, "--overwrite", "--skip-verification")
    assert done.code == 0, done.err
    before, after = contents(first), contents(out)
    assert before[INDEXER_SHARD] == after[INDEXER_SHARD]
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed == {"report.json", "report.html", "mla2dsa.json", "README.md"}
    assert set(before) - set(after) == {"report.html"}  # nothing was measured
    assert not set(after) - set(before)
    assert b"**Not verified**" in (out / "README.md").read_bytes()


def test_strip_gives_the_dense_model_back(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    dsa = small_conversion(tmp_path_factory)
    done = mla2dsa("strip", dsa, tmp_path / "dense")
    assert (done.code, done.err) == (0, "")
    assert "bit for bit" in done.out
    assert done.out.splitlines()[-1].endswith("corpus.py, held_out/, train.py, training.json")
    given, restored = contents(TINY), contents(tmp_path / "dense")
    assert restored == {name: given[name] for name in restored}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} < set(restored)
    assert_refused(mla2dsa("strip", dsa, tmp_path / "dense"), 2, tmp_path / "dense", "not empty")
    assert_refused(mla2dsa("strip", TINY, tmp_path / "x"), 1, TINY, "mla2dsa did not write it")
    assert_refused(mla2dsa("strip", tmp_path / "no", tmp_path / "x"), 1, tmp_path / "no", "no such folder")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


# Donors


@pytest.fixture
def donor(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shared conversion, for a test to change."""
    return Path(shutil.copytree(small_conversion(tmp_path_factory), tmp_path / "donor"))


def from_donor(donor: Path, out: Path, *flags: object) -> Any:
    return mla2dsa("convert", TINY, out, "--indexer", f"donor:{donor}", *flags)


def test_donor_gives_its_indexers(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    donor, out = small_conversion(tmp_path_factory), tmp_path / "dsa"
    recipe = small_flags(tmp_path_factory)[:2]
    done = from_donor(donor, out, *recipe, "--calibration", training_text(tmp_path_factory), "--json")
    assert done.code == 0, done.err
    assert contents(out)[INDEXER_SHARD] == contents(donor)[INDEXER_SHARD]
    report = done.json()
    assert (report["plan"]["source"], report["layers"]) == (f"donor:{donor}", [])
    assert report["verification"]["passed"] is True
    assert report["calibration"]["tokens"] == 0
    assert report["plan"]["indexer"]["index_topk"] == SMALL_TOPK
    assert [path.name for path in tmp_path.iterdir()] == ["dsa"]


def interleaved(name: str, tensor: Tensor) -> Tensor:
    """Rotary channels (0, half), (1, half + 1) ... side by side, as GLM has them."""
    if "weights_proj" in name:
        return tensor
    order = [*(part * ROPE // 2 + pair for pair in range(ROPE // 2) for part in (0, 1)), *range(ROPE, WIDTH)]
    return tensor.view(-1, WIDTH, *tensor.shape[1:])[:, order].reshape(tensor.shape)


def test_interleaved_donor_becomes_half_split(
    donor: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    original = contents(donor)[INDEXER_SHARD]
    with_indexers(donor, interleaved)
    assert contents(donor)[INDEXER_SHARD] != original
    edit_config(donor, {"indexer_rope_interleave": True})
    done = from_donor(donor, tmp_path / "dsa", "--skip-verification")
    assert done.code == 0, done.err
    assert contents(tmp_path / "dsa")[INDEXER_SHARD] == original
    assert read(tmp_path / "dsa" / "config.json")["indexer_rope_interleave"] is False
    given, made = (layer_weights(folder, LAYERS[2]) for folder in (donor, tmp_path / "dsa"))
    sample = random_sample()
    half_split = index_scores(made, TINY_INDEXER, sample)
    assert torch.allclose(
        index_scores(given, replace(TINY_INDEXER, rope_interleave=True), sample), half_split, rtol=1e-4
    )
    assert not torch.allclose(index_scores(given, TINY_INDEXER, sample), half_split, rtol=1e-2)


def layer_weights(folder: Path, layer: str) -> IndexerWeights:
    tensors = load_file(folder / INDEXER_SHARD)
    prefix = f"{layer}.indexer."
    return IndexerWeights.from_tensors(
        {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
    )


def random_sample(tokens: int = 48, rows: int = 12) -> SiteSample:
    config = read(TINY / "config.json")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, config["hidden_size"], generator=generator)
    q_resid = torch.randn(tokens, config["q_lora_rank"], generator=generator)
    angle = torch.arange(tokens)[:, None] * 0.3 ** torch.arange(ROPE // 2)
    blank = torch.zeros(rows, 1)
    return SiteSample(
        hidden, q_resid, angle.cos(), angle.sin(), torch.arange(tokens - rows, tokens), blank, blank, blank
    )


def cut(name: str, tensor: Tensor) -> Tensor:
    """wk of a model with a smaller hidden_size, in the second layer only."""
    return tensor[:, :100] if name == f"{LAYERS[1]}.indexer.wk.weight" else tensor


def test_donor_of_another_size(donor: Path, tmp_path: Path) -> None:
    with_indexers(donor, cut)
    hidden = read(TINY / "config.json")["hidden_size"]
    parts = [donor, f"{LAYERS[1]}.indexer.wk.weight is [128, 100]", f"this model needs [128, {hidden}]", "hidden_size"]
    assert_refused(from_donor(donor, tmp_path / "dsa", "--skip-verification"), 1, *parts)
    assert_refused(mla2dsa("plan", TINY, "--indexer", f"donor:{donor}"), 1, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["donor"]


@pytest.mark.parametrize(
    ("fields", "flags", "code", "parts"),
    [
        ({"index_n_heads": 4}, [], 1, ["indexer.wq_b.weight is [1024, 96]", "this model needs [512, 96]"]),
        ({"index_topk": None}, [], 1, ["index_topk in config.json", "no donor of indexers"]),
        ({}, ["--index-n-heads", 16], 2, ["the donor's indexer has 8 heads of 128", "16 of 128 were asked for"]),
        ({}, ["--index-topk", 1024], 2, ["index_topk 1024", "context of 1024"]),
    ],
    ids=["heads", "no-topk", "other-heads-asked", "topk"],
)
def test_donors_that_are_refused(
    fields: Mapping[str, object], flags: list[object], code: int, parts: list[str], donor: Path, tmp_path: Path
) -> None:
    edit_config(donor, fields)
    assert_refused(from_donor(donor, tmp_path / "dsa", *flags), code, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["donor"]


def test_dense_donor(tmp_path: Path) -> None:
    assert_refused(from_donor(TINY, tmp_path / "dsa", "--index-topk", 64), 1, TINY, "no donor of indexers")


@pytest.mark.parametrize("text", [True, False], ids=["text", "random-tokens"])
def test_bad_indexers_do_not_become_a_checkpoint(
    text: bool, donor: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with_indexers(donor, randomised)
    flags = [*small_flags(tmp_path_factory)[: None if text else 4], "--skip-transformers"]
    assert_refused(from_donor(donor, tmp_path / "dsa", *flags), 1, "verification failed", "expected at most")
    assert [path.name for path in tmp_path.iterdir()] == ["donor"]


# Quality


SLOW = pytest.mark.skipif(not os.environ.get("MLA2DSA_SLOW_TESTS"), reason="takes minutes: make test-slow")


@pytest.mark.parametrize(
    ("recipe", "tokens", "limit"),
    [
        pytest.param("indexer: closed-form", 16_384, 0.03, marks=SLOW),
        pytest.param("distil: {steps: 100}\nbudget: 256 steps", 65_536, 0.02, marks=SLOW),
    ],
    ids=["closed-form", "auto"],
)
def test_loss_on_held_out_text(
    recipe: str, tokens: int, limit: float, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """64 of up to 1024 keys a query, all layers at once: nats/token more than dense attention, on unseen files."""
    (tmp_path / "recipe.yaml").write_text(recipe)
    text = training_text(tmp_path_factory, CALIBRATION_BYTES)
    flags = ("--recipe", tmp_path / "recipe.yaml", "--index-topk", 64, "--calibration", text, "--tokens", tokens)
    done = mla2dsa("convert", TINY, tmp_path / "dsa", *flags, "--skip-verification")
    assert done.code == 0, done.err
    assert read(tmp_path / "dsa" / "config.json")["index_n_heads"] == HEADS
    assert read(tmp_path / "dsa" / "report.json")["calibration"]["tokens"] == tokens
    verified = mla2dsa(
        "verify", TINY, tmp_path / "dsa", "--text", TINY / "held_out", "--max-loss-delta", limit, "--json",
        "--skip-transformers",
    )  # fmt: skip
    assert verified.code == 0, verified.err
    measured = verified.json()["text"]
    assert (measured["length"], measured["positions"]) == (1024, 8 * 959)
    delta = {name: quality["loss_delta"] for name, quality in measured["by_selection"].items()}
    assert delta["oracle"] < delta["dsa"] <= limit
    assert delta["window"] > 5 * limit


# Layouts


@pytest.mark.parametrize(
    ("layout", "model_type", "checks"),
    [
        ("glm_moe_dsa", "glm_moe_dsa", "graph = GlmMoeDsaForCausalLM above index_topk"),
        ("own", "deepseek_v3", "graph = transformers' dense class up to index_topk"),
    ],
)
def test_a_layout_is_asked_for(
    layout: str, model_type: str, checks: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flags = small_flags(tmp_path_factory)
    done = mla2dsa("convert", TINY, tmp_path / "dsa", *flags, "--layout", layout, "--json")
    assert done.code == 0, done.err
    report = done.json()
    assert (report["layout"]["name"], report["plan"]["layout"]) == (layout, layout)
    proof = report["verification"]
    assert proof["passed"]
    assert checks in [check["name"] for check in proof["checks"]]
    assert bool(proof["skipped"]) == (layout == "own")
    config = read(tmp_path / "dsa" / "config.json")
    assert (config["model_type"], config["index_topk"]) == (model_type, SMALL_TOPK)
    assert mla2dsa("strip", tmp_path / "dsa", tmp_path / "dense").code == 0
    given, restored = contents(TINY), contents(tmp_path / "dense")
    assert restored == {name: given[name] for name in restored}


def test_a_layout_that_does_not_fit(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(TINY, dense)
    edit_config(dense, {"mlp_bias": True})
    flags = ("--index-topk", 64, "--layout", "deepseek_v32")
    assert_refused(mla2dsa("convert", dense, tmp_path / "dsa", *flags), 1, dense, "mlp_bias is true", "--layout own")
