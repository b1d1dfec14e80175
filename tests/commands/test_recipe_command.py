"""recipe init: a file to begin with, and never over another."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import TINY, assert_refused, mla2dsa

from mla2dsa.optimizer.recipe import Recipe, read_recipe


def test_it_is_the_default_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mla2dsa("recipe", "init").out == "recipe.yaml: every field with its default; for --recipe\n"
    assert read_recipe("recipe.yaml", {}) == Recipe()
    written = Path("recipe.yaml").read_text()
    assert mla2dsa("recipe", "init", "-o", "-").out == written
    assert mla2dsa("recipe", "init", "-o", "-", "--json").json() == {"recipe": written}
    assert_refused(mla2dsa("recipe", "init"), 2, "recipe.yaml: is there already and is left as it is", "-o")
    assert Path("recipe.yaml").read_text() == written
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_models_numbers_are_noted_and_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    assert mla2dsa("recipe", "init", TINY, "-o", file, "--json").json() == {"out": str(file)}
    assert "its context is 1024 tokens" in " ".join(file.read_text().replace("#", " ").split())
    assert read_recipe(str(file), {}) == Recipe()


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["init", "./nowhere"], 1, ["nowhere: no such folder"]),
        (["init", "-o", ""], 2, ["expected a path", "mla2dsa recipe init --help"]),
        (["init", "-o", "none/r.yaml"], 1, ["none/r.yaml: cannot be written (No such file or directory)"]),
        (["innit"], 2, ["did you mean init?", "mla2dsa recipe --help"]),
    ],
    ids=["model", "empty", "folder", "word"],
)
def test_refusals(
    words: list[str], code: int, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(mla2dsa("recipe", *words), code, *parts)
    assert not list(tmp_path.iterdir())
