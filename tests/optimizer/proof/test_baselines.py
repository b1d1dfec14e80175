"""Oracle, window and chance: which keys each selects, against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mla2dsa.optimizer.indexer.indexer_math import SINKS, oracle_scores, select, window_scores
from mla2dsa.optimizer.indexer.samples import SiteSample
from mla2dsa.optimizer.proof import baselines

HEADS, ROPE, SCALE = 3, 4, 0.7
SIZES = [(12, 5), (12, 8), (12, 4), (9, 12), (1, 1)]  # tokens, index_topk
BASELINES = [baselines.oracle, baselines.window, baselines.chance]


def queries_and_keys(tokens: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys whose first channels are one-hot: the output shows which were selected, as its values are positive there."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tokens, HEADS, tokens + ROPE, generator=generator)
    kv = torch.cat([torch.eye(tokens).expand(batch, -1, -1), torch.randn(batch, tokens, ROPE, generator=generator)], -1)
    return q, kv


SparseMla = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]


def indices(q: Tensor, index_topk: int) -> Tensor:
    """What an indexer would have selected: only the number of slots matters to a baseline."""
    return torch.full((*q.shape[:2], min(index_topk, q.shape[1])), -1, dtype=torch.int32)


def selected(baseline: SparseMla, q: Tensor, kv: Tensor, index_topk: int) -> list[list[set[int]]]:
    """Per sequence and query, the keys that were attended to; the same for all heads."""
    out = baseline(q, kv, indices(q, index_topk), SCALE, q.shape[1])
    assert out.shape == (*q.shape[:3], q.shape[1])
    heads = out > 0
    assert bool((heads == heads[:, :, :1]).all())
    return [[set(row.nonzero().flatten().tolist()) for row in sequence] for sequence in heads[:, :, 0]]


def mass(q: Tensor, kv: Tensor, row: int) -> Tensor:
    """Head-mean dense attention of one query over its past, [row + 1]."""
    return torch.softmax(SCALE * q[row] @ kv[: row + 1].T, -1).mean(0)


@pytest.mark.parametrize(("tokens", "index_topk"), SIZES)
def test_oracle_takes_the_keys_with_the_most_mass(tokens: int, index_topk: int) -> None:
    q, kv = queries_and_keys(tokens)
    for b, sequence in enumerate(selected(baselines.oracle, q, kv, index_topk)):
        for row, keys in enumerate(sequence):
            best = mass(q[b], kv[b], row).topk(min(index_topk, row + 1)).indices
            assert keys == set(best.tolist())


def test_no_set_captures_more_than_the_oracles() -> None:
    q, kv = queries_and_keys(8, batch=1)
    for row, keys in enumerate(selected(baselines.oracle, q, kv, 3)[0]):
        weight = mass(q[0], kv[0], row)
        others = itertools.combinations(range(row + 1), min(3, row + 1))
        assert float(weight[list(keys)].sum()) >= max(float(weight[list(other)].sum()) for other in others) - 1e-6


@pytest.mark.parametrize(("tokens", "index_topk"), SIZES)
def test_window_takes_the_last_keys_and_four_sinks(tokens: int, index_topk: int) -> None:
    q, kv = queries_and_keys(tokens)
    recent = min(index_topk, tokens) - SINKS
    for sequence in selected(baselines.window, q, kv, index_topk):
        for row, keys in enumerate(sequence):
            assert keys == {key for key in range(row + 1) if key < SINKS or key > row - recent}


@pytest.mark.parametrize("index_topk", [1, 2, 3])
def test_a_window_narrower_than_the_sinks(index_topk: int) -> None:
    q, kv = queries_and_keys(6)
    for sequence in selected(baselines.window, q, kv, index_topk):
        assert sequence == [set(range(min(row + 1, index_topk))) for row in range(6)]


@pytest.mark.parametrize(("tokens", "index_topk"), SIZES)
def test_chance_takes_as_many_past_keys_as_there_is_room_for(tokens: int, index_topk: int) -> None:
    q, kv = queries_and_keys(tokens)
    for sequence in selected(baselines.chance, q, kv, index_topk):
        for row, keys in enumerate(sequence):
            assert len(keys) == min(index_topk, row + 1)
            assert max(keys) <= row


def test_chance_is_the_same_every_time_and_looks_at_nothing() -> None:
    q, kv = queries_and_keys(12)
    other, _ = queries_and_keys(12, seed=1)
    assert selected(baselines.chance, q, kv, 5) == selected(baselines.chance, other, kv, 5)


def test_chance_prefers_no_key() -> None:
    """The last query of 2000 sequences: every key about equally often."""
    tokens, index_topk, batch = 10, 4, 2000
    q, kv = torch.zeros(batch, tokens, 1, tokens), torch.eye(tokens).expand(batch, -1, -1)
    out = baselines.chance(q, kv, indices(q, index_topk), 1.0, tokens)
    share = (out[:, -1, 0] > 0).float().mean(0)
    assert bool(((share - index_topk / tokens).abs() < 0.05).all())  # 4.5 standard deviations


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.__name__)
def test_values_are_the_softmax_over_the_selected_keys(baseline: SparseMla) -> None:
    q, kv = queries_and_keys(12)
    out = baseline(q, kv, indices(q, 6), SCALE, 12)
    for b, sequence in enumerate(selected(baseline, q, kv, 6)):
        for row, keys in enumerate(sequence):
            chosen = kv[b, sorted(keys)]
            expected = torch.softmax(SCALE * q[b, row] @ chosen.T, -1) @ chosen[:, :12]
            torch.testing.assert_close(out[b, row], expected)


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda b: b.__name__)
def test_with_room_for_every_key_all_are_dense(baseline: SparseMla) -> None:
    q, kv = queries_and_keys(9)
    everything = torch.arange(9, dtype=torch.int32).expand(2, 9, 9)
    causal = torch.where(everything <= torch.arange(9)[:, None], everything, -1)
    dense = torch.ops.mla2dsa.sparse_mla(q, kv, causal, SCALE, 9)
    torch.testing.assert_close(baseline(q, kv, indices(q, 9), SCALE, 9), dense)


def test_scores_of_the_recall_select_the_same_keys() -> None:
    """The loss and the recall of one line of a report are about the same selection."""
    tokens, index_topk = 20, 7
    q, kv = queries_and_keys(tokens, batch=1)
    rows = torch.arange(index_topk, tokens)
    weights = torch.zeros(len(rows), tokens)
    for i, row in enumerate(rows.tolist()):
        weights[i, : row + 1] = mass(q[0], kv[0], row)
    empty = torch.zeros(0)
    sample = SiteSample(empty, empty, empty, empty, rows, empty, empty, weights)
    for baseline, scores in ((baselines.oracle, oracle_scores), (baselines.window, window_scores)):
        chosen = [set(keys.tolist()) for keys in select(scores(sample), index_topk)]
        assert selected(baseline, q, kv, index_topk)[0][index_topk:] == chosen
