"""A recipe's file: what is written reads back as the recipe, and says what every field is for in the field's own words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from places import ROOT

from mla2dsa.errors import UsageError, UserError
from mla2dsa.optimizer.recipe import Distil, LayerDistil, LayerRecipe, Recipe, Verify, read_recipe
from mla2dsa.optimizer.recipes.writing import notes_of, recipe_text, write_recipe

RECIPES = {
    "defaults": Recipe(),
    "all": Recipe(
        indexer="distil", budget="500000 tokens", index_topk=64, index_n_heads=4, index_head_dim=24, calibration="a text.txt",
        tokens=7, sequence_length=80, rows=9, random_share=0.5, seed=2**32 - 1, distil=Distil(steps=3, lr=1e-7),
        verify=Verify(max_loss_delta=1e-5, sequences=1), layout="own", mtp="drop", untie=True, target=["vllm", "llama.cpp"],
    ),
    "donor": Recipe(indexer="donor", donor="some/model"),
    "layers": Recipe(layers={
        "*.[!0-2].*": LayerRecipe(indexer="distil", budget="1.5h", distil=LayerDistil(steps=3)), "a: #b": LayerRecipe(indexer="auto"),
        "0": LayerRecipe(distil=LayerDistil(lr=0.5)), "": LayerRecipe(),
    }),
}  # fmt: skip
PATHS = ["/a/b c", "~", "1", "true", "null", "12:30", "- a", "a: b", "a #b", "\n", "a\n\nb", "'", '"', "\\", "\t", "[a", "é", "\udcff",
         "\x7f", "x" * 300, "x, y}", "😀", " a ", "2001-01-01", "&a", "*a", "%", "---", "..."]  # fmt: skip


def written(folder: Path, recipe: Recipe) -> Recipe:
    file = folder / "recipe.yaml"
    write_recipe(file, recipe_text(recipe, "About\n it: #1"))
    return read_recipe(str(file), {})


@pytest.mark.parametrize("name", RECIPES)
def test_it_reads_back(name: str, tmp_path: Path) -> None:
    assert written(tmp_path, RECIPES[name]) == RECIPES[name]
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == RECIPES[name].fields()


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_any_path_reads_back(path: str, tmp_path: Path) -> None:
    assert written(tmp_path, Recipe(calibration=path)).calibration == path


def test_every_field_says_what_it_is_for() -> None:
    plain = " ".join(recipe_text().replace("#", " ").split())
    for kind in (Recipe, Distil, Verify):
        for name, field in kind.model_fields.items():
            assert f"{name}: " in plain
            assert field.description
            assert " ".join(field.description.split()) in plain
    assert all(len(line) <= 120 for line in recipe_text().splitlines())


def test_the_documentation_shows_it() -> None:
    block = (ROOT / "docs" / "recipe.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert block == recipe_text().split("\n\n", 1)[1], "put there what `mla2dsa recipe init -o -` prints"


def test_a_models_own_numbers_are_noted() -> None:
    notes = notes_of("some/model", {"num_attention_heads": 16, "max_position_embeddings": 512})
    text = " ".join(recipe_text(notes=notes).replace("#", " ").split())
    assert "for some/model at most 510, its context is 512 tokens" in text
    assert "for some/model 16" in text
    assert yaml.safe_load(recipe_text(notes=notes)) == Recipe().fields()
    assert yaml.safe_load(recipe_text(notes=notes_of("a\nb: 1", {}))) == Recipe().fields()


@pytest.mark.parametrize("kind", ["file", "folder", "link-to-nowhere"])
def test_nothing_is_written_over(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    match kind:
        case "file":
            file.write_text("mine")
        case "folder":
            file.mkdir()
        case _:
            file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"recipe\.yaml: is there already and is left as it is; name a new file"):
        write_recipe(file, "x")
    assert kind != "file" or file.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written \(No such file or directory\)"):
        write_recipe(tmp_path / "none" / "recipe.yaml", "x")
