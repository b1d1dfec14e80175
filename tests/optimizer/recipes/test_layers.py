"""Patterns of a recipe: what is said of some layers, what cannot be, and how a budget is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mla2dsa.errors import UsageError
from mla2dsa.optimizer.indexer.layer_fit import NEAR
from mla2dsa.optimizer.recipe import read_recipe
from mla2dsa.optimizer.recipes.layers import SHARED, Told, each_layer, sharing, trainings

NAMES = [f"model.layers.{number}.self_attn" for number in range(4)]
BASE = Told("auto", 1024, 3e-3)


def told(layers: dict[str, Any], **fields: Any) -> list[Told]:
    found = each_layer(read_recipe(None, {"calibration": "text", **fields, "layers": layers}), NAMES)
    assert list(found) == NAMES
    return list(found.values())


def test_without_patterns_all_are_told_the_same() -> None:
    assert told({}) == [BASE] * 4


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [("*", [0, 1, 2, 3]), ("model.layers.[0-2].*", [0, 1, 2]), ("*.[!0].*", [1, 2, 3]), (NAMES[2], [2]), ("*.?.self_attn", [0, 1, 2, 3])],
    ids=str,
)  # fmt: skip
def test_a_pattern_is_of_the_whole_name(pattern: str, matched: list[int]) -> None:
    closed = [number for number, one in enumerate(told({pattern: {"indexer": "closed-form"}})) if one != BASE]
    assert closed == matched


@pytest.mark.parametrize(
    "pattern", ["model.layers.7.*", "model.layers.0", "layers.0.self_attn", "MODEL.*", "", "[0-2]", "*.10.*"]
)
def test_a_pattern_that_matches_nothing(pattern: str) -> None:
    with pytest.raises(UsageError) as error:
        told({"*": {}, pattern: {"indexer": "distil"}})
    assert f"layers: {pattern!r} matches no layer; a pattern is of the whole name, as of {NAMES[0]}" in str(error.value)
    assert error.value.exit_code == 2


def test_the_last_that_matches_holds_field_by_field() -> None:
    first, second, third, fourth = told(
        {"*.[01].*": {"indexer": "distil", "distil": {"steps": 5}}, "*.[12].*": {"distil": {"lr": 0.1}, "indexer": "closed-form"},
         "*.2.*": {"indexer": "distil"}},
        distil={"steps": 9},
    )  # fmt: skip
    assert (first, second) == (Told("distil", 5, 3e-3), Told("closed-form", 0, 0.1))
    assert (third, fourth) == (Told("distil", 9, 0.1), Told("auto", 9, 3e-3))


# Training and budgets


def test_layers_are_trained_as_they_are_told() -> None:
    recipe = read_recipe(None, {"indexer": "closed-form", "seed": 3, "calibration": "text", "layers": {
        "*.0.*": {"indexer": "auto"}, "*.1.*": {"indexer": "distil", "distil": {"steps": 5}}}})  # fmt: skip
    auto, distil, closed, _ = trainings(recipe, NAMES).values()
    assert recipe.distils
    assert auto.schedule is not None
    assert distil.schedule is not None
    assert (auto.gap, auto.schedule.steps, auto.schedule.seed) == (NEAR, 1024, 3)
    assert (distil.gap, distil.schedule.steps) == (None, 5)
    assert (closed.schedule, closed.why) == (None, "as asked")


def test_a_budget_is_of_the_layers_that_share_it() -> None:
    layers = {"*.1.*": {"budget": "10 steps"}, "*.[23].*": {"indexer": "distil"}, "*.3.*": {"indexer": "closed-form"}}
    recipe = read_recipe(None, {"indexer": "distil", "budget": "10 steps", "layers": layers})
    trained = trainings(recipe, NAMES)
    budgets = [training.budget for training in trained.values()]
    assert [None if it is None else (it.amount, it.layers, it.of) for it in budgets] == [
        (10, 2, ""), (10, 1, "*.1.*"), (10, 2, ""), None
    ]  # fmt: skip
    assert [[name for name, _ in sharing(trained, one)] for one in NAMES] == [
        [NAMES[0], NAMES[2]], [NAMES[1]], [NAMES[0], NAMES[2]], [NAMES[3]]
    ]  # fmt: skip


def test_without_text_auto_spends_nothing() -> None:
    recipe = read_recipe(None, {"budget": "10 steps", "layers": {"*.0.*": {"indexer": "distil"}}})
    assert list(map(str, each_layer(recipe, NAMES[:2]).values())) == [
        "distil, at most 1024 steps at 0.003, budget 10 steps",
        "auto, without text to train on",
    ]
    first, *others = trainings(recipe, NAMES).values()
    assert first.budget is not None
    assert first.budget.layers == 1
    assert {other.why for other in others} == {"no calibration text to train on"}


@pytest.mark.parametrize(
    "layers",
    [{"*": {"budget": "1 steps"}, "*.[0-3].*": {"budget": "2 steps"}}, {"*.0.*": {"budget": "1 steps"}, "*": {"indexer": "closed-form"}}],
    ids=["covered", "closed"],
)  # fmt: skip
def test_a_budget_that_nobody_spends(layers: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"layers: '\*(\.0\.\*)?' has a budget, and no layer that would spend it"):
        told(layers)


def test_layers_that_share_are_not_trained() -> None:
    recipe = read_recipe(None, {"indexer": "distil", "budget": "10 steps", "share": "1,3"})
    assert [one.indexer for one in each_layer(recipe, NAMES).values()] == ["distil", SHARED, "distil", SHARED]
    trained = trainings(recipe, NAMES)
    assert [None if it.budget is None else it.budget.layers for it in trained.values()] == [2, None, 2, None]
    assert trained[NAMES[1]].schedule is None
    assert trained[NAMES[1]].why == "the layer shares the selection of another one"


def test_a_budget_of_layers_that_share_is_spent_by_nobody() -> None:
    recipe = read_recipe(None, {"indexer": "distil", "share": "1", "layers": {"*.1.*": {"budget": "9 steps"}}})
    with pytest.raises(UsageError, match="or share the selection of another layer"):
        each_layer(recipe, NAMES)


# What cannot be told of some layers alone


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"index_topk": 32}, "index_topk: config.json has one index_topk for all layers, in every layout; set it outside of layers"),
        ({"index_n_heads": 4}, "config.json has one index_n_heads for all layers"),
        ({"index_head_dim": 4}, "config.json has one index_head_dim for all layers"),
        ({"rows": 4}, "rows: is of all layers together, set it outside of layers; what can differ is indexer, budget, distil"),
        ({"layers": {}}, "is of all layers together"),
        ({"stepz": 4}, "stepz: no such field; known are indexer, budget, distil"),
        ({"distil": {"step": 4}}, "distil.step: no such field; known are steps, lr"),
        ({"distil": {"steps": 0}}, "distil.steps 0: "),
        ({"indexer": "magic"}, "indexer 'magic': "),
        ({"indexer": "donor:a/b"}, "a donor gives every layer its indexer"),
        ({"donor": "a/b"}, "a donor gives every layer its indexer"),
        ({"budget": "soon"}, "budget 'soon': expected a time"),
        ({"indexer": "closed-form", "budget": "1m"}, "closed-form does not train"),
        ("closed-form", "'closed-form': "),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_differ(said: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"layers: {{'model.layers.[0-2].*': {said}}}")
    with pytest.raises(UsageError) as error:
        read_recipe(str(file), {})
    assert str(error.value).startswith(f"{file}: layers.model.layers.[0-2].*")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_from_python_the_place_is_named_too() -> None:
    with pytest.raises(UsageError, match=r"--layers\.\*\.stepz: no such field; known are indexer, budget, distil"):
        read_recipe(None, {"layers": {"*": {"stepz": 3}}})


def test_a_donor_leaves_nothing_to_tell() -> None:
    with pytest.raises(UsageError, match="a donor gives every layer its indexer; leave out `layers`, or the donor"):
        read_recipe(None, {"indexer": "donor:a/b", "layers": {"*": {"indexer": "distil"}}})


def test_flags_override_the_recipe_and_leave_layers_told(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("budget: 9 steps\nlayers: {'*.0.*': {indexer: distil}}")
    recipe = read_recipe(str(file), {"indexer": "closed-form"})
    assert (recipe.indexer, recipe.budget) == ("closed-form", "9 steps")  # the budget has a layer that spends it
    assert [one.indexer for one in each_layer(recipe, NAMES).values()] == ["distil", *["closed-form"] * 3]
