"""Errors that count sequences, against the textbook and against samples whose positions are alike; the worst sequence."""

import math

import pytest
import torch
from torch import Tensor

from mla2dsa.optimizer.proof.figures import EXCERPT, STRETCHES, Tally, clustered_error, quality


def sampled(count: int, length: int, shared: float, seed: int = 0) -> list[Tensor]:
    """Sequences whose positions share a part of their value."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 1, generator=generator, dtype=torch.float64) * shared
    return list(common + torch.randn(count, length, generator=generator, dtype=torch.float64))


def test_of_equal_lengths_it_is_that_of_the_means() -> None:
    parts = sampled(9, 20, 1.0)
    means = torch.stack([part.mean() for part in parts])
    assert clustered_error(parts) == pytest.approx(float(means.std() / 3))


@pytest.mark.parametrize("shared", [0.0, 1.0], ids=["independent", "alike"])
def test_it_is_the_spread_of_the_mean(shared: float) -> None:
    """Means of many samples spread by it; over positions the error of alike ones would be ten times too small."""
    samples = [sampled(40, 100, shared, seed) for seed in range(300)]
    spread = float(torch.tensor([float(torch.cat(parts).mean()) for parts in samples]).std())
    told = sum(map(clustered_error, samples)) / len(samples)
    assert told == pytest.approx(spread, rel=0.15)
    flat = torch.cat(samples[0])
    by_position = float(flat.std() / len(flat) ** 0.5)
    assert (told > 5 * by_position) is bool(shared)


@pytest.mark.parametrize("parts", [[], [torch.ones(5)]], ids=["none", "one"])
def test_one_sequence_says_nothing_of_the_spread(parts: list[Tensor]) -> None:
    assert math.isnan(clustered_error(parts))


def test_longer_sequences_count_more() -> None:
    """The error of a ratio of sums, written out."""
    parts = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0])]
    assert clustered_error(parts) == pytest.approx((2 * (1.5**2 + 1.5**2)) ** 0.5 / 4)


def tally(delta: list[float]) -> Tally:
    values = torch.tensor(delta)
    return Tally([values], [values.abs()], [torch.ones(len(delta))])


@pytest.mark.parametrize(
    ("deltas", "sequence", "position"),
    [
        ([[0.0, 0.1, 0.0], [0.0, 0.0, 0.9]], 1, 42),
        ([[0.0, 0.5, 0.0], [0.0, 0.0, 0.1]], 0, 41),
        ([[9.0, 9.0, 9.0], [0.0, math.nan, 0.0]], 1, 41),
    ],
    ids=["second", "first", "nan"],
)
def test_the_worst_is_named(deltas: list[list[float]], sequence: int, position: int) -> None:
    sequences = [torch.arange(43) + 100 * number for number in range(2)]
    found = quality([tally(delta) for delta in deltas], sequences, 40, lambda ids: f"<{ids[-1]}>")
    worst = found.worst
    assert worst is not None
    assert (worst.sequence, worst.position) == (sequence, position)
    assert worst.tokens == tuple(range(100 * sequence + position + 1 - EXCERPT, 100 * sequence + position + 1))
    assert worst.excerpt == f"<{100 * sequence + position}>"


def test_the_ratio_of_perplexities() -> None:
    """ln of it is the mean of the paired differences, as llama.cpp has it."""
    found = quality([tally([0.1, 0.2]), tally([0.3, 0.4])], [torch.arange(9)] * 2, 7)
    assert math.log(found.ppl_ratio) == pytest.approx(found.loss_delta) == pytest.approx(0.25)
    assert found.ppl_ratio_error == pytest.approx(found.ppl_ratio * found.standard_error)
    assert found.position_error == pytest.approx(torch.tensor([0.1, 0.2, 0.3, 0.4]).std().item() / 2)
    assert found.sequence_deltas == pytest.approx((0.15, 0.35))
    assert found.worst is not None
    assert found.worst.excerpt == ""


@pytest.mark.parametrize("lengths", [[100, 100], [100, 7], [5, 3]], ids=["alike", "of-two-lengths", "short"])
def test_stretches_are_all_positions_once(lengths: list[int]) -> None:
    tallies = [tally([float(n) for n in range(length)]) for length in lengths]
    found = quality(tallies, [torch.arange(length + 11) for length in lengths], 11)
    stretches = found.by_position
    assert len(stretches) == min(STRETCHES, max(lengths))
    assert (stretches[0].first, stretches[-1].last) == (11, 10 + max(lengths))
    assert [s.first for s in stretches[1:]] == [s.last + 1 for s in stretches[:-1]]
    counts = [sum(min(length, s.last - 10) - min(length, s.first - 11) for length in lengths) for s in stretches]
    total = sum(count * s.loss_delta for count, s in zip(counts, stretches, strict=True))
    assert total / sum(counts) == pytest.approx(found.loss_delta)
    if min(lengths) == max(lengths):
        assert all(s.loss_delta == pytest.approx((s.first + s.last) / 2 - 11) for s in stretches)
