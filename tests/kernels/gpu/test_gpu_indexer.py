"""The indexer kernels in the interpreter: scores against float64, slots against the reference, tiles within a budget."""

from __future__ import annotations

import pytest
import torch
from comparing import close
from gpu_cases import FORMS, TOLERANCE, Target
from op_samples import causal, randn, ranges, small_ints
from torch import Tensor

from mla2dsa.kernels import reference
from mla2dsa.kernels.gpu.programs.indexer_program import FORMS as INDEXER_FORMS

pytest.importorskip("triton")
INTERPRETER = Target("cpu", 0)
BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
ALL_FORMS = pytest.mark.parametrize("form", INDEXER_FORMS)
# batch, queries, slots, heads, head width
SHAPES = [
    (2, 9, 37, 3, 40),
    (1, 1, 1, 1, 32),
    (1, 1, 70, 1, 64),
    (2, 3, 5, 16, 128),
    (1, 17, 33, 5, 33),
    (1, 2, 20, 64, 96),
    (1, 3, 40, 128, 32),
]


def in_range(scores: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    return scores.masked_fill(~reference.in_range(begin, end, scores.shape[2]), 0)


@BOTH_FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, queries, slots, heads, width = shape
    q, k = randn(batch, queries, heads, width, dtype=dtype), randn(batch, slots, width, seed=1, dtype=dtype)
    weights = randn(batch, queries, heads, seed=2, dtype=torch.float32)
    begin, end = ranges(batch, queries, slots, seed=slots)
    end[0, 0], begin[0, 0] = slots, 0
    want = in_range(reference.index_scores(q.double(), k.double(), weights), begin, end)
    got = in_range(INTERPRETER.scores(q, k, weights, begin, end, form), begin, end)
    close(got, want, rms=min(TOLERANCE[dtype], 1e-6))  # products and sums are float32 whatever the dtype


@ALL_FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_slots_with_ties(form: str, dtype: torch.dtype) -> None:
    q, k = small_ints(2, 11, 5, 36, dtype=dtype), small_ints(2, 83, 36, seed=1, dtype=dtype)
    weights, (begin, end) = small_ints(2, 11, 5, seed=2, dtype=dtype), ranges(2, 11, 83)
    for topk in (1, 13, 83, 200):
        want = reference.lightning_indexer(q, k, weights, begin, end, topk)
        assert torch.equal(INTERPRETER.indexer(q, k, weights, begin, end, topk, form), want)


@BOTH_FORMS
def test_causal_with_int32_ranges(form: str) -> None:
    q, k = small_ints(1, 40, 2, 32), small_ints(1, 60, 32, seed=1)
    weights, (begin, end) = small_ints(1, 40, 2, seed=2), causal(1, 40, past=20)
    want = reference.lightning_indexer(q, k, weights, begin, end, 16)
    assert torch.equal(INTERPRETER.indexer(q, k, weights, begin, end, 16, form), want)


@ALL_FORMS
def test_tiles_of_queries_change_nothing(form: str) -> None:
    q, k = small_ints(2, 19, 2, 32), small_ints(2, 50, 32, seed=1)
    weights, (begin, end) = small_ints(2, 19, 2, seed=2), ranges(2, 19, 50)
    want = reference.lightning_indexer(q, k, weights, begin, end, 16)
    assert torch.equal(INTERPRETER.indexer(q, k, weights, begin, end, 16, form, budget_mb=0), want)


@BOTH_FORMS
@pytest.mark.parametrize("heads", [1, 3, 16])
def test_nan_and_inf_rank_as_in_the_reference(form: str, heads: int) -> None:
    g = torch.Generator().manual_seed(5)
    q, k, weights = small_ints(1, 6, heads, 32), small_ints(1, 90, 32, seed=1), small_ints(1, 6, heads, seed=2)
    for tensor, every in ((q, 200), (k, 200), (weights, 9)):
        for value in (torch.nan, torch.inf, -torch.inf):
            tensor[torch.randint(0, every, tensor.shape, generator=g) == 0] = value
    begin, end = ranges(1, 6, 90, seed=1)
    want = reference.lightning_indexer(q, k, weights, begin, end, 20)
    assert torch.equal(INTERPRETER.indexer(q, k, weights, begin, end, 20, form), want)


@BOTH_FORMS
def test_keys_outside_every_range_are_not_looked_at(form: str) -> None:
    q, k, weights = small_ints(1, 5, 2, 32), small_ints(1, 64, 32, seed=1), small_ints(1, 5, 2, seed=2)
    begin, end = torch.full((1, 5), 20), torch.full((1, 5), 41)
    want = reference.lightning_indexer(q, k, weights, begin, end, 7)
    k[:, :20], k[:, 41:] = torch.nan, torch.inf
    assert torch.equal(INTERPRETER.indexer(q, k, weights, begin, end, 7, form), want)
