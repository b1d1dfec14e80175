"""What is taken for a layer: the closed form, or what training made of it, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mla_layer import make_layer

from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer import layer_fit
from mla2dsa.optimizer.indexer.distil import Distilled, DistilSchedule
from mla2dsa.optimizer.indexer.layer_fit import NO_TRAINING, NOTHING_SPENT, Budget, Fit, Samples, Spent, Training, fit

LAYER = make_layer(sharpness=4.0)
SAMPLES = Samples(*([LAYER.sample(seed) for seed in seeds] for seeds in (range(6), range(20, 23), range(30, 32))))
CONFIG = IndexerConfig(index_topk=12, index_n_heads=4, index_head_dim=20)
LENGTH = len(SAMPLES.fitted[0].hidden)


def run(training: Training = NO_TRAINING, spent: Spent = NOTHING_SPENT) -> Fit:
    return fit(LAYER.maps(), SAMPLES, CONFIG, training, spent)


def trained(steps: int = 48, lr: float = 3e-3, **options: Any) -> Training:
    return Training(DistilSchedule(steps, lr), **options)


def same(first: IndexerWeights, second: IndexerWeights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


@pytest.fixture(scope="module")
def closed() -> Fit:
    return run()


def test_without_training_it_is_the_closed_form(closed: Fit) -> None:
    assert (closed.indexer, closed.why, closed.steps, closed.negative) == ("closed-form", "as asked", 0, 0)
    assert closed.window < closed.recall == closed.closed_form_recall < closed.oracle
    assert run(Training(why="no text")).why == "no text"


def test_what_is_learnt_is_taken_where_it_is_better(closed: Fit) -> None:
    found = run(trained())
    assert (found.indexer, found.steps) == ("distilled", 48)
    assert found.recall > found.closed_form_recall == closed.recall
    assert found.recall == pytest.approx(layer_fit.recall(found.weights, CONFIG, SAMPLES.held_out))
    before, after = closed.oracle - closed.recall, closed.oracle - found.recall
    assert found.why == f"{before:.4f} below the oracle before, {after:.4f} after"


def test_near_the_oracle_nothing_is_trained(closed: Fit) -> None:
    gap = closed.oracle - closed.recall
    near = run(trained(gap=gap + 0.001))
    assert same(near.weights, closed.weights)
    assert near.steps == 0
    assert near.why.startswith(f"{gap:.4f} below the oracle, ")
    assert run(trained(steps=2, gap=gap - 0.001)).steps == 2


def test_a_rate_that_only_harms_is_not_taken(closed: Fit) -> None:
    found = run(trained(steps=17, lr=3.0))
    assert (found.indexer, found.steps, found.recall) == ("closed-form", 17, closed.recall)
    assert same(found.weights, closed.weights)
    assert "distilled captures" in found.why


def test_weights_that_turn_some_selections_round_are_not_taken(closed: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better on what is held out, but the sum of its head weights is below zero for one token of the vocabulary."""
    good = run(trained()).weights
    token = SAMPLES.vocabulary[1].hidden[3]
    total = good.weights_proj.sum(0)
    turned = good.weights_proj - (total @ token + 1e-2) / (token @ token) * token / len(good.weights_proj)
    bad = replace(good, weights_proj=turned)
    monkeypatch.setattr(layer_fit, "distil", lambda *arguments: Distilled(bad, (0.0,)))
    found = run(trained())
    assert found.indexer == "closed-form"
    assert same(found.weights, closed.weights)
    assert "of the vocabulary" in found.why


@pytest.mark.parametrize(
    ("amount", "unit", "spent", "steps"),
    [
        (40, "steps", NOTHING_SPENT, 10),
        (40, "steps", Spent(2, 8, 0.0), 16),
        (40, "steps", Spent(3, 38, 0.0), 2),
        (1000, "steps", NOTHING_SPENT, 48),
        (40 * LENGTH, "tokens", Spent(1, 10, 0.0), 10),
        (40.0, "seconds", NOTHING_SPENT, 10),
        (40.0, "seconds", Spent(3, 100, 34.5), 5),
    ],
    ids=["even share", "what was left over", "the rest", "more than asked for", "tokens", "time", "time left over"],
)
def test_a_budget_is_shared_by_the_layers(
    amount: float, unit: Any, spent: Spent, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_fit, "seconds_per_step", lambda *arguments: 1.0)
    assert run(trained(budget=Budget(amount, unit, 4)), spent).steps == steps


@pytest.mark.parametrize(
    "spent", [NOTHING_SPENT, Spent(3, 38, 0.0), Spent(0, 39, 0.0)], ids=["first", "late", "after a greedy one"]
)
@pytest.mark.parametrize(("shares", "steps"), [(1, 10), (3, 30)])
def test_a_budget_apart_is_the_same_whoever_came_before(shares: int, steps: int, spent: Spent) -> None:
    assert run(trained(budget=Budget(40, "steps", 4, apart=True, shares=shares)), spent).steps == steps


@pytest.mark.parametrize(
    "spent", [Spent(3, 40, 0.0), Spent(1, 50, 0.0), Spent(0, 39, 0.0)], ids=["gone", "more than gone", "no step"]
)
def test_a_budget_that_is_spent_leaves_the_closed_form(spent: Spent, closed: Fit) -> None:
    found = run(trained(budget=Budget(40, "steps", 4)), spent)
    assert (found.indexer, found.steps, found.why) == ("closed-form", 0, "the budget is spent")
    assert same(found.weights, closed.weights)
