"""The recipe that lies with a result: nothing in it is left open, and it makes the same again, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import contents
from command_line import (
    LAYERS,
    TINY,
    mla2dsa,
    quick_capture,  # noqa: F401  (a fixture)
    training_text,
)

from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.recipe import Recipe, read_recipe
from mla2dsa.optimizer.recipes.resolved import Chosen, kept_text, resolved

RECIPE = "mla2dsa-recipe.yaml"
SMALL = "index_topk: 16\nindex_head_dim: 24\nrows: 16\nverify: {sequences: 1, max_loss_delta: 9}\n"
CHOSEN = Chosen(IndexerConfig(64, 4, 32), 1024, 300, "deepseek_v32", dict(zip(LAYERS, (5, 0, 7, 0), strict=True)))


def test_what_was_left_open_is_said() -> None:
    made = resolved(Recipe(calibration="text"), CHOSEN)
    assert (made.index_topk, made.index_n_heads, made.index_head_dim) == (64, 4, 32)
    assert (made.tokens, made.sequence_length, made.layout) == (64 * 1024, 300, "deepseek_v32")
    assert [name for name, value in made.fields().items() if value is None] == ["donor", "budget"]
    assert resolved(made, CHOSEN) == made


def test_what_was_said_stays() -> None:
    layers = {"*.0.*": {"budget": "9 tokens"}, "*": {"distil": {"steps": 3}}}
    given = read_recipe(None, {"tokens": 7, "seed": 5, "budget": "9 steps", "layers": layers, "untie": True})
    made = resolved(given, CHOSEN)
    assert list(made.layers) == list(layers)
    same = ("tokens", "seed", "budget", "layers", "untie", "verify", "distil", "rows", "calibration", "indexer")
    assert all(getattr(made, name) == getattr(given, name) for name in same)


def test_a_time_becomes_the_steps_that_were_taken() -> None:
    """Other budgets, too: what one layer left, later ones had."""
    layers = {"*.2.*": {"budget": "1 steps", "indexer": "auto", "distil": {"lr": 0.5}}}
    made = resolved(read_recipe(None, {"indexer": "distil", "budget": "1.5h", "layers": layers}), CHOSEN)
    assert made.budget is None
    assert made.fields()["layers"] == {
        LAYERS[0]: {"indexer": "distil", "distil": {"steps": 5, "lr": 0.003}}, LAYERS[1]: {"indexer": "closed-form"},
        LAYERS[2]: {"indexer": "auto", "distil": {"steps": 7, "lr": 0.5}}, LAYERS[3]: {"indexer": "closed-form"},
    }  # fmt: skip


def test_layers_that_were_found_to_share_had_a_part_of_the_budget() -> None:
    """Told to share from the beginning, they would leave it to the others."""
    given = {"indexer": "distil", "budget": "12 steps", "share": "auto", "calibration": "text"}
    found = replace(CHOSEN, layout="glm_moe_dsa", indexer=replace(CHOSEN.indexer, shared=(2,)))
    made = resolved(read_recipe(None, given), found)
    assert (made.budget, made.share) == (None, [2])
    taken = [said.get("distil", {}).get("steps") for said in made.fields()["layers"].values()]
    assert taken == [5, None, 7, None]


def test_the_file_says_how_it_is_used(tmp_path: Path) -> None:
    made = resolved(Recipe(), CHOSEN)
    text = kept_text(made, "a\nb\udcff\x1b#", spent=True, allow_partial=True, trust_remote_code=False)
    (tmp_path / "r.yaml").write_text(text)
    assert read_recipe(str(tmp_path / "r.yaml"), {}) == made
    words = " ".join(text.replace("#", " ").split())
    assert (
        "`mla2dsa convert MODEL OUT --recipe FILE --allow-partial` makes the same indexers again, bit for bit" in words
    )
    assert "In the place of the budget" in words


def converted(folder: Path, recipe: Path) -> dict[str, Any]:
    done = mla2dsa("convert", TINY, folder, "--recipe", recipe, "--skip-transformers", "--json")
    assert done.code == 0, done.err
    return done.json()


@pytest.mark.usefixtures("quick_capture")
@pytest.mark.parametrize(
    "asked",
    [
        # sequences are as long as a short text allows, and a quarter of them random
        pytest.param('layers: {"*.[23].*": {indexer: distil, budget: 60 steps, distil: {lr: 0.001}}}\n', id="open"),
        pytest.param("indexer: distil\nbudget: 1s\nsequence_length: 64\ntokens: 512\ndistil: {lr: 0.001}\n", id="time"),
    ],
)
def test_it_makes_the_same_again(asked: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    words, given = tmp_path / "text.txt", tmp_path / "given.yaml"
    words.write_text(training_text(tmp_path_factory).read_text()[: 2_000 if "layers" in asked else 9_000])
    given.write_text(
        f"{SMALL}calibration: {words}\n{asked}{'' if 'indexer: distil' in asked else 'indexer: closed-form'}\n"
    )
    first = converted(tmp_path / "first", given)
    second = converted(tmp_path / "second", tmp_path / "first" / RECIPE)
    assert any(layer["steps"] for layer in first["layers"])
    assert "1s" in asked or any(layer["indexer"] == "distilled" for layer in first["layers"])
    made, again = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert made.keys() == again.keys() >= {RECIPE, "mla2dsa.json", "model-indexer.safetensors", "README.md"}
    different = {name for name in made if made[name] != again[name]}
    assert different <= {"mla2dsa.json", "report.json", "report.html"} | (
        {RECIPE} if "1s" in asked else set()
    )  # its first line on time
    assert first["verification"] == second["verification"]
    manifest = json.loads((tmp_path / "first" / "mla2dsa.json").read_text())
    assert manifest["recipe"] == read_recipe(str(tmp_path / "first" / RECIPE), {}).fields()
    assert RECIPE in {file["name"] for file in manifest["files"]}
    assert read_recipe(str(tmp_path / "second" / RECIPE), {}).fields() == manifest["recipe"]
