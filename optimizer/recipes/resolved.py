"""The recipe that a result came of, with nothing left open: what gives the same indexers again, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import short
from ...kernels.spec import IndexerConfig
from ..recipe import LayerDistil, LayerRecipe, Recipe, read_budget
from .layers import each_layer
from .writing import recipe_text


@dataclass(frozen=True)
class Chosen:
    """What a conversion chose where its recipe says nothing. planned, length: tokens of a sequence before and after looking at how
    much text there is. steps: of distillation that each layer took, by its name, 0 without an indexer of its own, none of a donor's."""

    indexer: IndexerConfig
    planned: int
    length: int
    layout: str
    steps: Mapping[str, int]


def resolved(recipe: Recipe, chosen: Chosen) -> Recipe:
    """With every field said, but for those that this source of indexers has no use for. Budgets become the steps that the layers
    took, where another day or the layers that share would have them take others."""
    fields = recipe.fields() | {
        "index_topk": chosen.indexer.index_topk, "index_n_heads": chosen.indexer.index_n_heads,
        "index_head_dim": chosen.indexer.index_head_dim, "tokens": recipe.tokens or chosen.planned * recipe.sequences,
        "sequence_length": chosen.length, "layout": chosen.layout,
        "share": list(chosen.indexer.shared) or "none",
    }  # fmt: skip
    if is_spent_otherwise(recipe):
        fields |= {"budget": None, "layers": _as_taken(recipe, chosen.steps)}
    return Recipe.model_validate(fields)


def is_spent_otherwise(recipe: Recipe) -> bool:
    """Whether a second run would give layers other steps of a budget: one that is a time, or that layers had a part of which turned out
    to need no indexer."""
    budgets = [
        budget for budget in (recipe.budget, *(said.budget for said in recipe.layers.values())) if budget is not None
    ]
    return any(recipe.share == "auto" or read_budget(budget)[1] == "seconds" for budget in budgets)


def _as_taken(recipe: Recipe, steps: Mapping[str, int]) -> dict[str, LayerRecipe]:
    closed = LayerRecipe(indexer="closed-form")
    told = each_layer(recipe, steps)
    return {
        name: LayerRecipe.model_validate({"indexer": one.indexer, "distil": LayerDistil(steps=steps[name], lr=one.lr)})
        if steps[name] else closed
        for name, one in told.items()
    }  # fmt: skip


def kept_text(recipe: Recipe, model: str, *, spent: bool, **flags: bool) -> str:
    """The file that lies with a result. spent: `is_spent_otherwise` of the recipe that was given; flags: of `convert`, that the
    result depends on and that are no field of a recipe."""
    given = [f"--{name.replace('_', '-')}" for name, is_given in flags.items() if is_given]
    about = (
        f"How this was made of {short(model)}. From the same model and text, with the versions in mla2dsa.json on the same kind of "
        f"machine, `{' '.join(['mla2dsa convert MODEL OUT --recipe FILE', *given])}` makes the same indexers again, bit for bit."
    )
    if spent:
        about += " In the place of the budget stand the steps that each layer took in it."
    return recipe_text(recipe, about)
