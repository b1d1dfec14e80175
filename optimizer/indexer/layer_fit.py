"""One layer's indexer: the closed form, then distillation where there is something to gain and a budget for it.

What is learnt is taken only where it holds: no less attention mass than the closed form on the held-out sequences, and no
token of the vocabulary whose head weights sum below zero (on it the selection would be turned round).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from ...kernels.spec import IndexerConfig, IndexerWeights
from .closed_form import closed_form
from .distil import DistilSchedule, distil, seconds_per_step
from .head_weights import negative_share
from .indexer_math import index_scores, mean_recall, oracle_scores, window_scores
from .samples import SiteMaps, SiteSample

# Swept by benchmarks/constants.py.
NEAR = 0.002  # of attention mass: closed forms this close to the oracle are left as they are

OnStep = Callable[[int, float], None]  # step, loss


@dataclass(frozen=True)
class Budget:
    """What distillation may take in so many layers together, an even share each; what one layer leaves is the later ones'. of: tells
    budgets of the same amount apart. apart: it is nobody's, so that what a layer takes does not depend on those before; shares: how many
    it has then, one for each layer that it serves beside its own."""

    amount: float
    unit: Literal["seconds", "tokens", "steps"]
    layers: int
    of: str = ""
    apart: bool = False
    shares: int = 1  # fixed by what a layer is on its own


@dataclass(frozen=True)
class Spent:
    """Of one budget so far: layers that are done, steps, seconds (counted where the budget is of time)."""

    layers: int
    steps: int
    seconds: float

    def and_of(self, layer: Fit) -> Spent:
        return Spent(self.layers + 1, self.steps + layer.steps, self.seconds + layer.seconds)


@dataclass(frozen=True)
class Training:
    """How to distil. schedule: None stops at the closed form, and why says why. gap: layers whose closed form is that near to
    the oracle are not distilled (None: all are)."""

    schedule: DistilSchedule | None = None
    gap: float | None = None
    budget: Budget | None = None
    why: str = "as asked"


NO_TRAINING, NOTHING_SPENT = Training(), Spent(0, 0, 0.0)


@dataclass(frozen=True)
class Samples:
    """Of one layer. held_out: decide what is taken; vocabulary: of sequences that go through the whole vocabulary."""

    fitted: Sequence[SiteSample]
    held_out: Sequence[SiteSample]
    vocabulary: Sequence[SiteSample]


@dataclass(frozen=True)
class Fit:
    """The indexer of a layer, and how it does on the held-out sequences.

    indexer: which was taken; why: in words. recall: head-mean dense attention mass that its index_topk keys capture; oracle: the
    most any selection can; window: the last index_topk - 4 tokens and 4 sinks. negative: share of the vocabulary's tokens whose
    head weights sum below zero. steps: of distillation, taken or not; seconds: what they took. stats: of the closed form.
    """

    weights: IndexerWeights
    indexer: Literal["closed-form", "distilled"]
    why: str
    recall: float
    oracle: float
    window: float
    closed_form_recall: float
    negative: float
    steps: int
    seconds: float
    stats: dict[str, float]


def fit(
    maps: SiteMaps,
    samples: Samples,
    config: IndexerConfig,
    training: Training,
    spent: Spent,
    on_step: OnStep | None = None,
) -> Fit:
    """Raises UserError where the closed form or the training does."""
    start = closed_form(maps, samples.fitted, config, samples.vocabulary)
    of_closed = recall(start.weights, config, samples.held_out)
    oracle = mean_recall(oracle_scores, samples.held_out, config.index_topk)
    closed = Fit(
        weights=start.weights, indexer="closed-form", why=training.why, recall=of_closed, oracle=oracle,
        window=mean_recall(window_scores, samples.held_out, config.index_topk), closed_form_recall=of_closed,
        negative=_negative(start.weights, samples), steps=0, seconds=0.0,
        stats={name: float(number) for name, number in asdict(start.stats).items()},
    )  # fmt: skip
    if training.schedule is None:
        return closed
    if training.gap is not None and oracle - of_closed <= training.gap:
        return replace(closed, why=f"{oracle - of_closed:.4f} below the oracle, {training.gap} is near enough")
    steps = min(training.schedule.steps, _granted(training.budget, spent, start.weights, config, samples.fitted))
    if steps < 1:
        return replace(closed, why="the budget is spent")
    return _distilled(closed, start.start, config, samples, replace(training.schedule, steps=int(steps)), on_step)


def recall(weights: IndexerWeights, config: IndexerConfig, samples: Sequence[SiteSample]) -> float:
    """Head-mean dense attention mass that index_topk keys of the indexer hold."""
    with torch.no_grad():
        return mean_recall(lambda sample: index_scores(weights, config, sample), samples, config.index_topk)


def _negative(weights: IndexerWeights, samples: Samples) -> float:
    return negative_share(weights.weights_proj.sum(0), samples.vocabulary)


def _granted(
    budget: Budget | None, spent: Spent, start: IndexerWeights, config: IndexerConfig, samples: Sequence[SiteSample]
) -> float:
    """Steps that the layer's share of what is left has room for."""
    if budget is None:
        return math.inf
    length = len(samples[0].hidden)
    spent = NOTHING_SPENT if budget.apart else spent
    used = {"steps": spent.steps, "tokens": spent.steps * length, "seconds": spent.seconds}[budget.unit]
    share = budget.shares * (budget.amount - used) / max(1, budget.layers - spent.layers)
    if budget.unit == "seconds":
        return share / seconds_per_step(start, config, samples[0])
    return share if budget.unit == "steps" else share / length


def _distilled(
    closed: Fit,
    start: IndexerWeights,
    config: IndexerConfig,
    samples: Samples,
    schedule: DistilSchedule,
    on_step: OnStep | None,
) -> Fit:
    """What training makes of `start` where that is no worse than the closed form, else the closed form with the reason."""
    began = time.monotonic()
    learnt = distil(start, config, samples.fitted, schedule, on_step).weights
    tried = replace(closed, steps=schedule.steps, seconds=time.monotonic() - began)
    reached, negative = recall(learnt, config, samples.held_out), _negative(learnt, samples)
    if negative > closed.negative:
        return replace(tried, why=f"distilled head weights sum below zero on {negative:.2%} of the vocabulary")
    if not reached >= closed.recall:  # NaN is no gain
        return replace(tried, why=f"distilled captures {reached:.4f} on held-out sequences, {closed.recall:.4f} before")
    why = f"{closed.oracle - closed.recall:.4f} below the oracle before, {closed.oracle - reached:.4f} after"
    return replace(tried, weights=learnt, indexer="distilled", why=why, recall=reached, negative=negative)
