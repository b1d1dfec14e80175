"""`convert --share`: layers without an indexer are chosen, written, proved, run, stripped and made again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents, edit_config
from command_line import TINY, assert_refused, mla2dsa, quick_capture, small_flags  # noqa: F401  (a fixture)
from families import build
from safetensors import safe_open

from mla2dsa.errors import UsageError
from mla2dsa.files.json_files import read_json
from mla2dsa.optimizer.before.cuts import Sequences
from mla2dsa.optimizer.before.fingerprints import layer_fingerprints
from mla2dsa.optimizer.indexer.progress_store import ProgressStore
from mla2dsa.optimizer.inspect import inspect
from mla2dsa.optimizer.model.cached_model import open_torch_session, shared_layers
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.recipe import read_recipe
from mla2dsa.runtime.generation import prefill

pytestmark = pytest.mark.usefixtures("quick_capture")
FAST = ("--indexer", "closed-form")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's layers are few and unlike each other: what sharing may cost is set so high that some share."""
    out = tmp_path_factory.mktemp("auto") / "dsa"
    flags, recipe = list(small_flags(tmp_path_factory)), out.parent / "recipe.yaml"
    recipe.write_text(Path(str(flags[1])).read_text() + "\nshare_loss: 0.1\nlayout: auto\n")
    recipe.write_text(recipe.read_text().replace("sequences: 2", "sequences: 2, max_loss_delta: 0.2"))
    flags[1] = recipe
    done = mla2dsa("convert", TINY, out, *flags, *FAST, "--share", "auto")
    assert done.code == 0, done.err
    (out.parent / "said.txt").write_text(done.out)
    return out


def layers_with_indexers(folder: Path) -> set[str]:
    with safe_open(folder / "model-indexer.safetensors", "pt") as file:
        return {name.split(".indexer.")[0] for name in file.keys()}  # noqa: SIM118  (not a dict)


def test_layers_share_as_the_report_says(chosen: Path) -> None:
    found = read_json(chosen / "report.json")["sharing"]
    assert found["shared"]
    assert 0 not in found["shared"]
    assert found["loss"] <= found["allowed"] == 0.1
    assert [one["loss"] for one in found["tried"] if one["layers"] == len(found["shared"])] == [found["loss"]]
    kinds = ["shared" if layer in found["shared"] else "full" for layer in range(4)]
    config = read_json(chosen / "config.json")
    assert (config["model_type"], config["indexer_types"]) == ("glm_moe_dsa", kinds)
    assert config["index_topk_pattern"] == "".join(kind[0].upper() for kind in kinds)
    assert layers_with_indexers(chosen) == {
        f"model.layers.{layer}.self_attn" for layer, kind in enumerate(kinds) if kind == "full"
    }
    assert found["names"] == [f"model.layers.{layer}.self_attn" for layer in found["shared"]]
    said = (chosen.parent / "said.txt").read_text()
    assert f"without one of its own: {', '.join(found['names'])}" in said
    assert (
        f"{len(found['shared'])} of 4 indexers and caches of index keys less, {found['loss']:+.4f} nats/token" in said
    )


def test_what_is_told_is_of_the_indexers_that_are_there(chosen: Path, tmp_path: Path) -> None:
    report = read_json(chosen / "report.json")
    shared = report["sharing"]["names"]
    with safe_open(chosen / "model-indexer.safetensors", "pt") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert report["plan"]["new_parameters"] == stored
    assert {layer["name"] for layer in report["layers"]} == layers_with_indexers(chosen)
    told = {name: one["indexer"] for name, one in report["plan"]["indexers"].items()}
    assert [name for name, indexer in told.items() if indexer == "shared"] == shared
    assert all(f"`{name}`" in (chosen / "README.md").read_text() for name in shared)
    later = "which layers have no indexer is seen by the loss"
    assert later not in " ".join(report["plan"]["notes"])
    recipe = tmp_path / "auto.yaml"
    recipe.write_text(f"index_topk: 64\nshare: auto\ncalibration: {TINY / 'held_out'}\n")
    planned = mla2dsa("plan", TINY, "--recipe", recipe, "--json").json()
    assert later in " ".join(planned["notes"])


def test_transformers_was_asked_and_agrees(chosen: Path) -> None:
    """Its class reads `indexer_types`: logits above index_topk are its, through layers that share."""
    checks = {check["name"]: check for check in read_json(chosen / "report.json")["verification"]["checks"]}
    assert checks["graph = GlmMoeDsaForCausalLM above index_topk"]["passed"]
    assert checks["keys selected = GlmMoeDsaForCausalLM's, up to rounding"]["passed"]


def test_it_is_verified_again(chosen: Path) -> None:
    done = mla2dsa(
        "verify", TINY, chosen, "--skip-transformers", "--sequences", "2", "--json", "--text", TINY / "held_out"
    )
    failed = [check["name"] for check in json.loads(done.out)["checks"] if not check["passed"]]
    assert failed in ([], ["loss increase on text, nats/token"]), done.err  # 0.1 was allowed here for sharing alone
    layers = json.loads(done.out)["layers"]
    assert len(layers) == 4
    assert all(0 < layer["dsa"] <= layer["oracle"] + 1e-6 and layer["maps"] for layer in layers)


def test_a_shared_layers_recall_is_that_of_the_layer_it_shares_with(chosen: Path, tmp_path: Path) -> None:
    """With another indexer in the layer before, the mass of both is another."""
    from command_line import randomised, with_indexers

    first = read_json(chosen / "report.json")["sharing"]["shared"][0]
    other = with_indexers(Path(shutil.copytree(chosen, tmp_path / "other")), randomised)
    told = []
    for folder in (chosen, other):
        done = mla2dsa(
            "verify", TINY, folder, "--skip-transformers", "--sequences", "1", "--json", "--text", TINY / "held_out"
        )
        told.append([layer["dsa"] for layer in json.loads(done.out)["layers"]])
    assert told[1][first] < told[0][first] - 0.01


def test_the_same_again_from_its_own_recipe(chosen: Path, tmp_path: Path) -> None:
    done = mla2dsa(
        "convert", TINY, tmp_path / "again", "--recipe", chosen / "mla2dsa-recipe.yaml", "--skip-verification"
    )
    assert done.code == 0, done.err
    for name in ("model-indexer.safetensors", "config.json"):
        assert contents(tmp_path / "again")[name] == contents(chosen)[name]


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """(what a budget made, with what flags)."""
    out = tmp_path_factory.mktemp("budgeted") / "dsa"
    flags, recipe = list(small_flags(tmp_path_factory)), out.parent / "recipe.yaml"
    recipe.write_text(Path(str(flags[1])).read_text() + "\nshare_loss: 0.2\n")
    recipe.write_text(recipe.read_text().replace("sequences: 2", "sequences: 2, max_loss_delta: 0.5"))
    flags[1] = recipe
    flags += ["--indexer", "distil", "--budget", "64 steps", "--share", "auto", "--skip-verification"]
    done = mla2dsa("convert", TINY, out, *flags)
    assert done.code == 0, done.err
    return out, flags


def test_who_serves_whom_is_in_the_report(budgeted: tuple[Path, list[object]]) -> None:
    report = read_json(budgeted[0] / "report.json")
    shared, serves = report["sharing"]["shared"], {layer["name"]: layer["serves"] for layer in report["layers"]}
    expected, last = dict[str, int](), ""
    for number in range(4):
        last = last if number in shared else f"model.layers.{number}.self_attn"
        expected[last] = expected.get(last, -1) + 1
    assert shared
    assert serves == expected
    assert {layer["name"]: layer["steps"] for layer in report["layers"]} == {
        name: 16 * (1 + count) for name, count in serves.items()
    }


def test_the_same_again_without_the_budget(budgeted: tuple[Path, list[object]], tmp_path: Path) -> None:
    recipe = budgeted[0] / "mla2dsa-recipe.yaml"
    done = mla2dsa("convert", TINY, tmp_path / "again", "--recipe", recipe, "--skip-verification")
    assert done.code == 0, done.err
    for name in ("model-indexer.safetensors", "config.json"):
        assert contents(tmp_path / "again")[name] == contents(budgeted[0])[name]


def test_interrupted_while_choosing(
    budgeted: tuple[Path, list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all layers and the first that serves another are kept, and nothing of them is fitted again."""
    save, made = ProgressStore.save, list[str]()

    def interrupting(self: ProgressStore, result: Any) -> None:
        save(self, result)
        made.append(result.key)
        if result.serves and len(made) <= 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressStore, "save", interrupting)
    done = mla2dsa("convert", TINY, tmp_path / "dsa", *budgeted[1])
    assert_refused(done, 130, "interrupted", "5 finished indexers are kept, pass --resume")
    resumed = mla2dsa("convert", TINY, tmp_path / "dsa", *budgeted[1], "--resume")
    assert resumed.code == 0, resumed.err
    assert sum(line.endswith("kept from before") for line in resumed.err.splitlines()) == 5
    assert len(made) == len(set(made))
    again, whole = (read_json(folder / "report.json") for folder in (tmp_path / "dsa", budgeted[0]))
    assert (again["layers"], again["sharing"]) == (whole["layers"], whole["sharing"])
    assert contents(tmp_path / "dsa")["model-indexer.safetensors"] == contents(budgeted[0])["model-indexer.safetensors"]


def test_what_a_budget_gives_depends_on_who_shares() -> None:
    """A layer that serves another takes other steps of it, and leaves others to those behind."""
    cut = Sequences([], [], [], [], [], [], "")
    names = [f"model.layers.{layer}.self_attn" for layer in range(4)]
    layers: dict[str, Any] = {"*.[13].*": {"indexer": "auto", "budget": "40 steps"}}
    marks = [
        layer_fingerprints(
            Checkpoint.open(TINY), read_recipe(None, fields | {"share": share, "layers": layers}), cut, names
        )
        for fields in [{"indexer": "closed-form", "calibration": str(TINY / "held_out")}]
        for share in ("none", [2], "auto")
    ]
    assert [len({mark[name] for mark in marks}) for name in names] == [
        1,
        3,
        2,
        3,
    ]  # the third is told otherwise where it shares


def test_stripped_it_is_the_dense_model(chosen: Path, tmp_path: Path) -> None:
    assert mla2dsa("strip", chosen, tmp_path / "dense").code == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "dense" / name).read_bytes() == (TINY / name).read_bytes()


def test_exported_it_answers_alike(chosen: Path, tmp_path: Path) -> None:
    assert mla2dsa("export", chosen, tmp_path / "onnx", "--max-seq", "128").code == 0
    texts = []
    for folder in (chosen, tmp_path / "onnx"):
        done = mla2dsa("generate", folder, "def read_lines(path):", "--max-new-tokens", "12", "--json")
        assert done.code == 0, done.err
        texts.append(json.loads(done.out))
    assert texts[0]["text"] == texts[1]["text"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dense, DSA) of a family that no DSA class fits, with a list of layers."""
    folder = tmp_path_factory.mktemp("own")
    build("deepseek_v2", num_hidden_layers=3).save_pretrained(folder / "dense")
    done = mla2dsa(
        "convert", folder / "dense", folder / "dsa", "--index-topk", "32", "--index-head-dim", "16", "--share", "1", "--tokens", "512",
        "--skip-verification",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder / "dense", folder / "dsa"


def test_own_layout(own: tuple[Path, Path]) -> None:
    dense, dsa = own
    config = read_json(dsa / "config.json")
    assert (config["index_shared_layers"], config.get("indexer_types")) == ([1], None)
    assert shared_layers(Checkpoint.open(dsa)) == (1,)
    ids = [list(range(3, 27))]
    both = [prefill(open_torch_session(folder, 1, 32), ids, 24) for folder in (dense, dsa)]
    torch.testing.assert_close(both[1], both[0], rtol=1e-4, atol=1e-5)
    assert inspect(str(dsa))
    done = mla2dsa("verify", dense, dsa, "--skip-transformers", "--sequences", "1")
    assert "dense = DSA up to index_topk (graph)" in done.out, done.err


@pytest.mark.parametrize("value", [[2, 1], [1.0], "1", [True]], ids=str)
def test_own_layout_with_a_strange_list(own: tuple[Path, Path], value: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(own[1], tmp_path / "copy"))
    edit_config(copy, {"index_shared_layers": value})
    done = mla2dsa("export", copy, tmp_path / "onnx")
    assert_refused(done, 1, "index_shared_layers", "expected numbers of layers in ascending order")


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (("--share", "auto"), 2, ("share", "decided by the loss on text", "give calibration text")),
        (("--share", "1", "--layout", "deepseek_v32"), 2, ("deepseek_v32 has an indexer in every layer",)),
        (("--share", "4"), 1, ("share: 4 cannot share a selection", "from 1 to 3", "3 is model.layers.3.self_attn")),
        (("--share", "0"), 2, ("--share [0]", "the first layer, 0, cannot share")),
        (("--share", "2,1"), 2, ("--share [2, 1]", "layers' numbers in ascending order")),
        (("--share", "9" * 5000), 2, ("expected none, auto, or layers' numbers",)),
        (("--share", "\N{ARABIC-INDIC DIGIT TWO}"), 2, ("expected none, auto, or layers' numbers",)),
        (("--share", "some"), 2, ("--share ['some']", "expected none, auto, or layers' numbers")),
        (("--share", "1", "--target", "mlx-lm"), 1, ("mlx-lm", "layers share indexers")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value[0].startswith("--") else "",
)  # fmt: skip
def test_what_cannot_be(flags: tuple[str, ...], code: int, parts: tuple[str, ...], tmp_path: Path) -> None:
    done = mla2dsa("convert", TINY, tmp_path / "out", "--index-topk", "64", *flags)
    assert_refused(done, code, *parts)
    assert not (tmp_path / "out").exists()


def test_a_failure_names_the_sharing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What three layers of four lose with the first one's selection is no text's fault."""
    done = mla2dsa(
        "convert",
        TINY,
        tmp_path / "out",
        *small_flags(tmp_path_factory),
        *FAST,
        "--share",
        "1,2,3",
        "--skip-transformers",
    )
    assert_refused(
        done, 1, "verification failed", "let fewer layers share an indexer (model.layers.1.self_attn and 2 more do)"
    )


def test_more_is_not_allowed_for_sharing_than_for_all() -> None:
    with pytest.raises(UsageError, match=r"share_loss 0\.05 is no less than verify\.max_loss_delta 0\.05"):
        read_recipe(None, {"share": "auto", "share_loss": 0.05, "calibration": "text"})


def test_an_empty_list_is_none() -> None:
    made = read_recipe(None, {"share": [], "layout": "deepseek_v32"})
    assert (made.share, made.shares) == ("none", False)


@pytest.mark.parametrize("layers", [None, "4"], ids=str)
def test_without_the_number_of_layers(layers: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(TINY, tmp_path / "copy"))
    edit_config(copy, {"num_hidden_layers": layers})
    flags = ("--index-topk", "64", "--share", "1", "--target", "transformers", "--dry-run")
    assert_refused(mla2dsa("convert", copy, tmp_path / "out", *flags), 1, "num_hidden_layers")


@pytest.mark.parametrize("layout", ["glm_moe_dsa", "own"])
def test_what_a_dense_model_says_of_sharing_means_nothing(layout: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(TINY, tmp_path / "copy"))
    said: dict[str, Any] = {
        "indexer_types": ["full", "shared", "full", "full"],
        "index_topk_freq": 2,
        "index_shared_layers": [3],
    }
    edit_config(copy, said)
    flags = ("--index-topk", "64", *FAST, "--tokens", "512", "--layout", layout, "--skip-verification")
    done = mla2dsa("convert", copy, tmp_path / "dsa", *flags)
    assert done.code == 0, done.err
    assert shared_layers(Checkpoint.open(tmp_path / "dsa")) == ()
    assert not said.keys() & read_json(tmp_path / "dsa" / "config.json").keys()
    assert mla2dsa("strip", tmp_path / "dsa", tmp_path / "dense").code == 0
    assert (tmp_path / "dense" / "config.json").read_bytes() == (copy / "config.json").read_bytes()
