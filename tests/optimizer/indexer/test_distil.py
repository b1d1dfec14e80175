"""Layer-wise distillation: it learns, it repeats itself exactly, and it never hands back worse than it was given."""

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
from mla2dsa.optimizer.indexer.distil import Distilled, DistilSchedule, distil, divergence
from mla2dsa.optimizer.indexer.indexer_math import index_scores, mean_recall, oracle_scores, random_indexer
from mla2dsa.optimizer.indexer.samples import SiteSample

LAYER = make_layer(sharpness=4.0)
SAMPLES = [LAYER.sample(seed) for seed in range(6)]
HELD_OUT = [LAYER.sample(seed) for seed in range(20, 23)]
CONFIG = IndexerConfig(index_topk=12, index_n_heads=4, index_head_dim=20)
RANDOM = random_indexer(CONFIG, 64, 48, seed=1)


def run(
    start: IndexerWeights = RANDOM, steps: int = 24, lr: float = 3e-3, eval_every: int = 8, seed: int = 0
) -> Distilled:
    return distil(start, CONFIG, SAMPLES, HELD_OUT, DistilSchedule(steps, lr, eval_every=eval_every, seed=seed))


def held_out_recall(weights: IndexerWeights) -> float:
    with torch.no_grad():
        return mean_recall(lambda sample: index_scores(weights, CONFIG, sample), HELD_OUT, CONFIG.index_topk)


def same(first: IndexerWeights, second: IndexerWeights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_learns_from_a_random_start() -> None:
    result = run(steps=64)
    assert result.curve[0].recall == pytest.approx(held_out_recall(RANDOM))
    assert result.recall_best > result.curve[0].recall + 0.1
    assert held_out_recall(result.weights) == pytest.approx(result.recall_best)
    assert result.curve[-1].loss < 0.8 * result.curve[1].loss
    assert all(tensor.isfinite().all() for tensor in vars(result.weights).values())


def test_improves_the_closed_form() -> None:
    start = closed_form(LAYER.maps(), SAMPLES, CONFIG).weights
    result = run(start, steps=48)
    assert result.recall_best > result.curve[0].recall + 0.005
    assert not same(result.weights, start)


def test_repeats_itself_bit_for_bit_and_the_seed_matters() -> None:
    first, again, other = run(), run(), run(seed=1)
    assert same(first.weights, again.weights)
    assert first.curve[1:] == again.curve[1:]
    assert not same(first.weights, other.weights)


def test_works_where_the_caller_has_gradients_off() -> None:
    with torch.no_grad():
        off = run(steps=8)
    assert same(off.weights, run(steps=8).weights)


def test_the_start_is_left_alone() -> None:
    before = {name: tensor.clone() for name, tensor in vars(RANDOM).items()}
    run(steps=4)
    assert same(RANDOM, IndexerWeights(**before))
    assert not any(tensor.requires_grad for tensor in vars(RANDOM).values())


@settings(max_examples=8, deadline=None)
@given(lr=st.floats(1e-5, 3.0), seed=st.integers(0, 100))
def test_never_returns_worse_than_its_start(lr: float, seed: int) -> None:
    start = closed_form(LAYER.maps(), SAMPLES[:2], CONFIG).weights
    result = run(start, steps=20, lr=lr, seed=seed)
    assert result.recall_best >= result.curve[0].recall
    assert held_out_recall(result.weights) == pytest.approx(result.recall_best)
    assert result.recall_best == max(point.recall for point in result.curve)


def test_a_rate_that_only_harms_gives_the_start_back() -> None:
    start = closed_form(LAYER.maps(), SAMPLES, CONFIG).weights
    result = run(start, steps=17, lr=3.0, eval_every=17)
    assert result.steps == 17
    assert result.curve[-1].recall < result.curve[0].recall
    assert same(result.weights, start)


@pytest.mark.parametrize("lr", [1e25, float("inf")], ids=str)
def test_divergence_is_an_error(lr: float) -> None:
    with pytest.raises(UserError, match="distillation diverged"):
        run(steps=32, lr=lr)


def test_hidden_states_that_are_not_finite_are_an_error() -> None:
    broken = replace(SAMPLES[0], hidden=torch.full_like(SAMPLES[0].hidden, torch.nan))
    with pytest.raises(UserError, match="not finite"):
        distil(RANDOM, CONFIG, [broken], HELD_OUT, DistilSchedule(4))


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(UserError, match="at least one calibration sequence"):
        distil(RANDOM, CONFIG, [], HELD_OUT, DistilSchedule(4))
    with pytest.raises(UserError, match="no query row"):
        distil(RANDOM, replace(CONFIG, index_topk=500), SAMPLES, HELD_OUT, DistilSchedule(4))


def test_every_step_is_reported_and_every_sequence_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(weights: IndexerWeights, config: IndexerConfig, sample: SiteSample) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(next(index for index, known in enumerate(SAMPLES) if known is sample))
        return index_scores(weights, config, sample)

    monkeypatch.setattr(distil_module, "index_scores", spy)
    reports: list[tuple[int, float]] = []
    schedule = DistilSchedule(18, eval_every=5)
    result = distil(RANDOM, CONFIG, SAMPLES, HELD_OUT, schedule, lambda step, loss: reports.append((step, loss)))
    assert [step for step, _ in reports] == list(range(1, 19))
    assert [point.step for point in result.curve] == [0, 5, 10, 15, 18]
    assert result.curve[1].loss == pytest.approx(sum(loss for _, loss in reports[:5]) / 5)
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
    cooling = [schedule.rate(step, plateau=40) for step in (40, 56, 72, 80)]
    assert cooling == pytest.approx([1.2e-3, 0.65e-3, 1e-4, 1e-4])


def test_cools_down_and_ends_once_recall_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil_module, "PLATEAU_STEPS", 8)
    monkeypatch.setattr(distil_module, "PLATEAU_GAIN", 2.0)  # no gain is enough
    monkeypatch.setattr(distil_module, "COOL_STEPS", 6)
    rates: list[float] = []
    step = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, closure: None = None) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    result = run(steps=200, eval_every=4)
    assert result.steps == 8 + 6
    assert [point.step for point in result.curve] == [0, 4, 8, 12, 14]
    falls = torch.tensor(rates[8:]).diff()
    assert (falls < 0).all()
    assert falls.std() < 1e-7  # on a straight line


def test_ends_when_it_has_reached_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = mean_recall(oracle_scores, HELD_OUT, CONFIG.index_topk)
    monkeypatch.setattr(distil_module, "ORACLE_MARGIN", oracle - held_out_recall(RANDOM) - 0.01)
    result = run(steps=200, eval_every=8)
    assert result.steps < 200
    assert result.curve[-1].recall == result.recall_best >= result.curve[0].recall + 0.01


def test_a_start_without_spare_rows_survives_the_row_scaling() -> None:
    """Zero rows of wk (index heads wider than needed) stay zero and do no harm."""
    config = replace(CONFIG, index_head_dim=64)
    start = closed_form(LAYER.maps(), SAMPLES, config).weights
    assert start.wk[8 + 1 + 32 :].abs().max() == 0
    result = distil(start, config, SAMPLES, HELD_OUT, DistilSchedule(24, eval_every=24))
    assert all(tensor.isfinite().all() for tensor in vars(result.weights).values())
    assert result.weights.wk[8 + 1 + 32 :].abs().max() < 1e-3


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
