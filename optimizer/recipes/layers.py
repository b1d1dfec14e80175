"""What each layer is told: the recipe, and over it what its patterns say, the last one that matches first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ...errors import UsageError, short
from ..indexer.distil import DistilSchedule
from ..indexer.layer_fit import NEAR, Budget, Training
from ..recipe import TRAINED, LayerRecipe, Recipe, read_budget

SHARED = "shared"  # no source of indexers: the layer attends to what another selected


@dataclass(frozen=True)
class Told:
    """How one layer's indexer is made; indexer: SHARED where there is to be none. steps, lr: of its distillation, 0 steps where nothing
    is distilled. budget: of all layers that share it; shared: the pattern that it was given with, "" for the recipe's own."""

    indexer: str
    steps: int
    lr: float
    budget: str | None = None
    shared: str = ""

    def over(self, pattern: str, said: LayerRecipe) -> Told:
        """With what a pattern says."""
        told = replace(
            self, indexer=said.indexer or self.indexer, steps=said.distil.steps or self.steps,
            lr=said.distil.lr or self.lr,
        )  # fmt: skip
        return told if said.budget is None else replace(told, budget=said.budget, shared=pattern)

    def without(self) -> Told:
        """Of a layer that shares the selection of another one: nothing is made."""
        return replace(self, indexer=SHARED, steps=0, budget=None, shared="")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if not self.steps:
            return self.indexer if self.indexer not in TRAINED else f"{self.indexer}, without text to train on"
        budget = "" if self.budget is None else f", budget {self.budget}"
        return f"{self.indexer}, at most {self.steps} steps at {self.lr:g}{budget}"


def each_layer(recipe: Recipe, names: Iterable[str]) -> dict[str, Told]:
    """By the layers' names, in their order. Raises UsageError for a pattern that matches none of them, and for a budget that nobody
    would spend."""
    base = Told(recipe.indexer, recipe.distil.steps, recipe.distil.lr, recipe.budget)
    told = dict.fromkeys(names, base)
    for pattern, said in recipe.layers.items():
        matched = [name for name in told if fnmatchcase(name, pattern)]
        if not matched:
            example = next(iter(told), "model.layers.0.self_attn")
            raise UsageError(
                f"layers: {short(repr(pattern))} matches no layer; a pattern is of the whole name, as of {example}, "
                "with * for any part of it"
            )
        told |= {name: told[name].over(pattern, said) for name in matched}
    told |= {name: one.without() for number, (name, one) in enumerate(told.items()) if number in recipe.shared}
    spent = {one.shared for one in told.values() if one.indexer in TRAINED}
    for pattern, said in recipe.layers.items():
        if said.budget is not None and pattern not in spent:
            raise UsageError(
                f"layers: {short(repr(pattern))} has a budget, and no layer that would spend it: a later pattern has another "
                "for them, or they are not distilled, or share the selection of another layer"
            )
    untrained = {name: one for name, one in told.items() if not recipe.trains(one.indexer)}
    return told | {name: replace(one, steps=0, budget=None, shared="") for name, one in untrained.items()}


def trainings(recipe: Recipe, names: Iterable[str]) -> dict[str, Training]:
    """How each layer's indexer is trained. Raises UsageError as `each_layer` does."""
    told = each_layer(recipe, names)
    sharing = Counter(one.shared for one in told.values() if one.budget is not None)
    return {name: _training(recipe, one, sharing[one.shared]) for name, one in told.items()}


def _training(recipe: Recipe, told: Told, sharing: int) -> Training:
    if not recipe.trains(told.indexer):
        why = {"closed-form": "as asked", SHARED: "the layer shares the selection of another one"}
        return Training(why=why.get(told.indexer, "no calibration text to train on"))
    schedule = DistilSchedule(told.steps, told.lr, seed=recipe.seed)
    budget = None
    if told.budget is not None:
        budget = Budget(*read_budget(told.budget), sharing, told.shared, apart=recipe.share == "auto")
    return Training(schedule, NEAR if told.indexer == "auto" else None, budget)


def sharing(trained: Mapping[str, Training], name: str) -> list[tuple[str, Training]]:
    """What decides how a layer is trained: its own training, and where it shares a budget that of all who do."""
    budget = trained[name].budget
    if budget is None:
        return [(name, trained[name])]
    return [(other, training) for other, training in trained.items() if training.budget == budget]
