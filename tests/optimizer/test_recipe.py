"""Recipe: file and flags become one validated recipe, and every mistake is one line that names the field."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla2dsa.errors import UsageError
from mla2dsa.optimizer.recipe import Distil, Recipe, Verify, read_budget, read_recipe


def recipe_file(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


# What is read


def test_nothing_asked_gives_the_defaults() -> None:
    assert read_recipe(None, {}) == Recipe()
    assert Recipe().indexer == "auto"
    assert Recipe().index_topk is None


@pytest.mark.parametrize(
    ("given", "budget"),
    [("90s", (90, "seconds")), ("10m", (600, "seconds")), ("1.5h", (5400, "seconds")), (" 2000 steps ", (2000, "steps")),
     ("500000tokens", (500_000, "tokens"))],
    ids=str,
)  # fmt: skip
def test_budget(given: str, budget: tuple[float, str], tmp_path: Path) -> None:
    for recipe in (
        read_recipe(None, {"budget": given}),
        read_recipe(recipe_file(tmp_path, f"indexer: distil\nbudget: {given}"), {}),
    ):
        assert recipe.budget == given.strip()
        assert read_budget(recipe.budget) == budget


@pytest.mark.parametrize(
    "given", ["١٠m", "10", "m", "-1m", "0m", "0.0 steps", "1e3 steps", "10 m s", "9" * 20 + "s", "nan s"]
)
def test_no_budget(given: str) -> None:
    with pytest.raises(UsageError, match=r"^--budget .*expected a time \(90s, 10m, 1\.5h\), tokens"):
        read_recipe(None, {"budget": given})


@pytest.mark.parametrize("source", ["closed-form", "donor:some/model"])
def test_nothing_to_spend_a_budget_on(source: str, tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "budget: 10m")
    assert read_recipe(file, {"indexer": source}).budget is None  # the flag overrides the file
    assert read_recipe(file, {"indexer": "distil"}).budget == "10m"
    with pytest.raises(UsageError, match=f"{source.partition(':')[0]} does not train"):
        read_recipe(None, {"indexer": source, "budget": "10m"})


@pytest.mark.parametrize(
    ("fields", "trains", "sequences", "random"),
    [({}, False, 16, 0), ({"calibration": "t"}, True, 64, 21), ({"indexer": "distil"}, True, 64, 0),
     ({"indexer": "closed-form", "calibration": "t"}, False, 16, 5),
     ({"calibration": "t", "random_share": 0.5}, True, 64, 64), ({"calibration": "t", "random_share": 0}, True, 64, 0)],
    ids=["auto without text", "auto", "distil without text", "closed form", "half", "none"],
)  # fmt: skip
def test_text_is_what_there_is_training_on(
    fields: dict[str, object], trains: bool, sequences: int, random: int
) -> None:
    recipe = read_recipe(None, fields)
    assert (recipe.distils, recipe.sequences, recipe.random_beside(recipe.sequences)) == (trains, sequences, random)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}"], ids=["empty", "comment", "empty-mapping"])
def test_an_empty_file_gives_the_defaults(tmp_path: Path, text: str) -> None:
    assert read_recipe(recipe_file(tmp_path, text), {}) == Recipe()


def test_file(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "indexer: distil\nindex_topk: 512\ndistil: {steps: 10}\nverify:\n  sequences: 2\n")
    read = read_recipe(file, {})
    assert (read.indexer, read.index_topk, read.distil, read.verify) == (
        "distil", 512, Distil(steps=10), Verify(sequences=2)
    )  # fmt: skip


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "index_topk: 512\nseed: 3\n")
    read = read_recipe(file, {"index_topk": 256, "seed": None, "rows": None})
    assert (read.index_topk, read.seed, read.rows) == (256, 3, 128)


@pytest.mark.parametrize("number", ["3e-3", "0.003", "3.0e-3"])
def test_numbers_as_people_write_them(tmp_path: Path, number: str) -> None:
    """YAML 1.1 takes 3e-3 for a string."""
    assert read_recipe(recipe_file(tmp_path, f"distil: {{lr: {number}}}"), {}).distil.lr == 0.003
    limit = read_recipe(recipe_file(tmp_path, f"verify: {{max_loss_delta: {number}}}"), {}).verify.max_loss_delta
    assert limit == 0.003


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().seed = 1  # type: ignore[misc]


# Donors


@pytest.mark.parametrize(
    ("file", "flags"),
    [
        (None, {"indexer": "donor:some/model"}),
        ("indexer: donor:some/model", {}),
        ("indexer: donor\ndonor: some/model", {}),
        ("indexer: donor\ndonor: another/model", {"indexer": "donor:some/model"}),
        ("indexer: distil", {"indexer": "donor:some/model"}),
    ],
    ids=["flag", "file", "two-fields", "flag-over-file", "flag-over-distil"],
)
def test_donor(tmp_path: Path, file: str | None, flags: dict[str, Any]) -> None:
    read = read_recipe(recipe_file(tmp_path, file) if file else None, flags)
    assert (read.indexer, read.donor) == ("donor", "some/model")


def test_a_flag_replaces_the_files_donor(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, "indexer: donor:some/model")
    assert read_recipe(file, {"indexer": "distil"}).donor is None


@pytest.mark.parametrize(
    ("file", "flags"),
    [(None, {"indexer": "donor"}), (None, {"indexer": "donor:"}), ("donor: some/model", {}),
     ("indexer: distil\ndonor: some/model", {})],
    ids=["no-path", "empty-path", "path-without-donor", "path-with-distil"],
)  # fmt: skip
def test_a_donor_and_its_path_go_together(tmp_path: Path, file: str | None, flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="donor needs a path"):
        read_recipe(recipe_file(tmp_path, file) if file else None, flags)


# Mistakes


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("index_topK: 64", "index_topK"),
        ("distil: {step: 3}", "distil.step"),
        ("index_topk: 0", "index_topk"),
        ("index_topk: many", "index_topk"),
        ("index_topk: 2.5", "index_topk"),
        ("index_topk: true", "index_topk"),
        ("indexer: magic", "indexer"),
        ("rows: null", "rows"),
        ("distil: {lr: -1}", "distil.lr"),
        ("distil: {lr: .inf}", "distil.lr"),
        ("distil: {lr: fast}", "distil.lr"),
        ("distil: {lr: true}", "distil.lr"),
        ("distil: {steps: 0}", "distil.steps"),
        ("distil: 10", "distil"),
        ("random_share: 0.95", "random_share"),
        ("random_share: -0.1", "random_share"),
        ("budget: 600", "budget"),
        ("verify: {max_loss_delta: 0}", "verify.max_loss_delta"),
        ("verify: {sequences: 0}", "verify.sequences"),
        ("sequence_length: 1", "sequence_length"),
        ("tokens: 0", "tokens"),
        ("calibration: [a, b]", "calibration"),
        ("seed: -1", "seed"),
        ("7: 1", "7"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = recipe_file(tmp_path, text)
    with pytest.raises(UsageError) as error:
        read_recipe(file, {})
    assert str(error.value).startswith(f"{file}: {named}")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_an_unknown_field_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"index_topK: no such field; known are .*index_topk"):
        read_recipe(recipe_file(tmp_path, "index_topK: 64"), {})
    with pytest.raises(UsageError, match=r"distil\.step: no such field; known are steps, lr$"):
        read_recipe(recipe_file(tmp_path, "distil: {step: 64}"), {})


def test_a_bad_flag_is_called_by_its_flag(tmp_path: Path) -> None:
    for file in (None, recipe_file(tmp_path, "index_topk: 64")):
        with pytest.raises(UsageError, match=r"^--index-topk 0: "):
            read_recipe(file, {"index_topk": 0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"index_topk: [", "not YAML (line 1"),
        (b"- index_topk: 64", "expected a mapping"),
        (b"just text", "expected a mapping"),
        (b"\xff\xfe", "cannot be read"),
    ],
    ids=["unclosed", "list", "text", "not-utf-8"],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_recipe(str(path), {})
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.yaml", ""], ids=["missing", "folder"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="recipe cannot be read"):
        read_recipe(str(tmp_path / name), {})


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(10)
)
HOSTILE = {
    "bomb": (BOMB, "anchors and aliases are not taken"),
    "bomb-in-a-field": (BOMB + "calibration: *k\n", "anchors and aliases are not taken"),
    "endless": ("index_topk: &a [*a]", "anchors and aliases are not taken"),
    "merge": ("<<: &a {index_topk: 3}\nseed: 1", "anchors and aliases are not taken"),
    "python": ("!!python/object/apply:os.system ['true']", "not YAML"),
    "deep": ("[" * 20_000, "nested too deeply"),
    "deep-mapping": ("{a: " * 9_000, "nested too deeply"),
    "twice": ("index_topk: 3\nindex_topk: 64", "a field is there twice"),
    "twice-below": ("verify: {sequences: 1, sequences: 2}", "a field is there twice"),
    "long": ("calibration: " + "x" * 200_000, "longer than 100000 bytes"),
    "no-date": ("tokens: 2001-99-99", "not YAML"),
    "digits": ("tokens: " + "9" * 9_999, "recipe.yaml"),
    "large": ("index_n_heads: 10000000000", "index_n_heads 10000000000"),
    "nul": ('calibration: "a\\0b"', "a path has no NUL character"),
    "nul-in-donor": ('indexer: "donor:a\\0b"', "a path has no NUL character"),
    "long-value": ("indexer: " + "x" * 90_000, "indexer 'xxx"),
    "long-field": ("? " + "x" * 90_000 + "\n: 1", "no such field"),
    "terminal-codes": ('index_topk: "\\e[2J"', r"index_topk '\x1b[2J'"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_a_short_line(tmp_path: Path, kind: str) -> None:
    text, part = HOSTILE[kind]
    file, started = recipe_file(tmp_path, text), time.process_time()
    with pytest.raises(UsageError) as error:
        read_recipe(file, {})
    assert time.process_time() - started < 2
    assert part in str(error.value)
    assert file in str(error.value)
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["fifo", "device"])
def test_a_recipe_is_a_regular_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match=r"recipe cannot be read: .*expected a regular file"):
        read_recipe(str(tmp_path / "recipe.yaml"), {})


@pytest.mark.parametrize("given", ["", "vLLM", "vllm,"], ids=repr)
def test_a_flag_with_a_list_is_named_as_a_flag(given: str) -> None:
    with pytest.raises(UsageError, match=r"^--target '"):
        read_recipe(None, {"target": given.split(",")})
