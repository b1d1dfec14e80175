"""Layer-wise distillation: it learns, it repeats itself exactly, and it keeps head weights above zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_layer import make_layer

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer import distil as distil_module
from mla2dsa.optimizer.indexer.closed_form import closed_form
from mla2dsa.optimizer.indexer.distil import (
    Distilled,
    DistilSchedule,
    distil,
    divergence,
    seconds_per_step,
    sign_hinge,
)
from mla2dsa.optimizer.indexer.head_weights import negative_share
from mla2dsa.optimizer.indexer.indexer_math import index_scores, mean_recall, random_indexer
from mla2dsa.optimizer.indexer.samples import SiteSample

LAYER = make_layer(sharpness=4.0)
SAMPLES = [LAYER.sample(seed) for seed in range(6)]
HELD_OUT = [LAYER.sample(seed) for seed in range(20, 23)]
CONFIG = IndexerConfig(index_topk=12, index_n_heads=4, index_head_dim=20)
RANDOM = random_indexer(CONFIG, 64, 48, seed=1)


def run(start: IndexerWeights = RANDOM, steps: int = 24, lr: float = 3e-3, seed: int = 0) -> Distilled:
    return distil(start, CONFIG, SAMPLES, DistilSchedule(steps, lr, seed=seed))


def held_out_recall(weights: IndexerWeights) -> float:
    with torch.no_grad():
        return mean_recall(lambda sample: index_scores(weights, CONFIG, sample), HELD_OUT, CONFIG.index_topk)


def same(first: IndexerWeights, second: IndexerWeights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_learns_from_a_random_start() -> None:
    result = run(steps=64)
    assert held_out_recall(result.weights) > held_out_recall(RANDOM) + 0.1
    assert sum(result.losses[-8:]) < 0.8 * sum(result.losses[:8])
    assert all(tensor.isfinite().all() for tensor in vars(result.weights).values())


def test_improves_the_closed_form() -> None:
    start = closed_form(LAYER.maps(), SAMPLES, CONFIG).weights
    assert held_out_recall(run(start, steps=48).weights) > held_out_recall(start) + 0.002


def test_repeats_itself_bit_for_bit_and_the_seed_matters() -> None:
    first, again, other = run(), run(), run(seed=1)
    assert same(first.weights, again.weights)
    assert first.losses == again.losses
    assert not same(first.weights, other.weights)


def test_head_weights_of_seldom_tokens_stay_above_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states with little in common: what the KL alone does to their head weights, and what the hinge does."""
    layer = make_layer(sharpness=4.0)
    layer = replace(layer, common=0.1 * layer.common)
    samples = [layer.sample(seed, length=200, vocabulary=120) for seed in range(6)]
    start = closed_form(layer.maps(), samples, CONFIG).weights
    shares = []
    for weight in (0.0, distil_module.SIGN_WEIGHT):
        monkeypatch.setattr(distil_module, "SIGN_WEIGHT", weight)
        learnt = distil(start, CONFIG, samples, DistilSchedule(64, 1e-2)).weights
        shares.append(negative_share(learnt.weights_proj.sum(0), samples))
    assert shares[0] > 0.005
    assert shares[1] == 0


def test_hinge_is_what_sums_are_short_of_the_margin() -> None:
    sample = replace(SAMPLES[0], hidden=torch.eye(4))
    weights = torch.tensor([[1.0, 1.0, 1.0, -1.0], [0.0, 1.0, -1.0, 0.0]])  # sums 1, 2, 0, -1: of mean size 1
    margin = distil_module.SIGN_MARGIN
    assert sign_hinge(weights, sample) == pytest.approx((margin + margin + 1) / 4)


def test_a_step_is_timed_and_changes_nothing() -> None:
    before = {name: tensor.clone() for name, tensor in vars(RANDOM).items()}
    assert 0 < seconds_per_step(RANDOM, CONFIG, SAMPLES[0]) < 60
    assert same(RANDOM, IndexerWeights(**before))


def test_works_where_the_caller_has_gradients_off() -> None:
    with torch.no_grad():
        off = run(steps=8)
    assert same(off.weights, run(steps=8).weights)


def test_the_start_is_left_alone() -> None:
    before = {name: tensor.clone() for name, tensor in vars(RANDOM).items()}
    run(steps=4)
    assert same(RANDOM, IndexerWeights(**before))
    assert not any(tensor.requires_grad for tensor in vars(RANDOM).values())


@pytest.mark.parametrize("lr", [1e25, float("inf")], ids=str)
def test_divergence_is_an_error(lr: float) -> None:
    with pytest.raises(UserError, match="distillation diverged"):
        run(steps=32, lr=lr)


def test_hidden_states_that_are_not_finite_are_an_error() -> None:
    broken = replace(SAMPLES[0], hidden=torch.full_like(SAMPLES[0].hidden, torch.nan))
    with pytest.raises(UserError, match="not finite"):
        distil(RANDOM, CONFIG, [broken], DistilSchedule(4))


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(UserError, match="at least one calibration sequence"):
        distil(RANDOM, CONFIG, [], DistilSchedule(4))


def test_every_step_is_reported_and_every_sequence_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(weights: IndexerWeights, config: IndexerConfig, sample: SiteSample) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(next(index for index, known in enumerate(SAMPLES) if known is sample))
        return index_scores(weights, config, sample)

    monkeypatch.setattr(distil_module, "index_scores", spy)
    reports: list[tuple[int, float]] = []
    result = distil(RANDOM, CONFIG, SAMPLES, DistilSchedule(18), lambda step, loss: reports.append((step, loss)))
    assert reports == list(enumerate(result.losses, start=1))
    assert len(reports) == 18
    epochs = [seen[start : start + 6] for start in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_rate_warms_up_and_falls_to_a_twentieth() -> None:
    schedule = DistilSchedule(steps=100, lr=2e-3, warmup=4)
    assert [schedule.rate(step) for step in (0, 1)] == pytest.approx([0.5e-3, 1e-3 * 0.99])
    assert schedule.rate(50) == pytest.approx(1e-3)
    assert schedule.rate(99) == pytest.approx(1e-4)
    assert DistilSchedule(steps=16, warmup=1).rate(0) == pytest.approx(1e-3)
    assert DistilSchedule(steps=17, warmup=1).rate(0) == pytest.approx(3e-3)
    assert DistilSchedule(steps=16, warmup=1, lr=1e-4).rate(0) == pytest.approx(1e-4)


def test_a_start_without_spare_rows_survives_the_row_scaling() -> None:
    """Zero rows of wk (index heads wider than needed) stay zero and do no harm."""
    config = replace(CONFIG, index_head_dim=64)
    start = closed_form(LAYER.maps(), SAMPLES, config).weights
    assert start.wk[8 + 2 + 32 :].abs().max() == 0
    result = distil(start, config, SAMPLES, DistilSchedule(24))
    assert all(tensor.isfinite().all() for tensor in vars(result.weights).values())
    assert result.weights.wk[8 + 2 + 32 :].abs().max() < 1e-3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.1, 20))
def test_divergence_is_the_kl_of_mass_to_softmax(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    future = torch.arange(9) > torch.arange(2, 8)[:, None]
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    mass = (temperature * logits).masked_fill(future, -torch.inf).softmax(-1)
    scores = torch.randn(6, 9, generator=generator, dtype=torch.float64).masked_fill(future, -torch.inf)
    rows = [
        F.kl_div(scores[r, : r + 3].log_softmax(-1), mass[r, : r + 3], reduction="sum", log_target=False)
        for r in range(6)
    ]
    torch.testing.assert_close(divergence(scores, mass), torch.stack(rows).mean())
    assert divergence(scores, mass) >= 0
    exact = (temperature * logits).masked_fill(future, -torch.inf)
    assert divergence(exact, mass) == pytest.approx(0, abs=1e-9)
