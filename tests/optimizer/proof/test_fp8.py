"""Indexer scores in FP8, as an op in the place of `lightning_indexer`, against the maths written out."""

import math

import pytest
import torch
from torch import Tensor

from mla2dsa.optimizer.proof import fp8
from mla2dsa.optimizer.proof.fp8 import Fp8Scores

TOKENS, HEADS, WIDTH, TOPK = 40, 4, 32, 8


def arguments() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, TOKENS, HEADS, WIDTH, generator=generator)
    k = torch.randn(2, TOKENS, WIDTH, generator=generator) * torch.logspace(-2, 2, TOKENS)[None, :, None]
    end = torch.arange(1, TOKENS + 1).expand(2, -1)
    return q, k, torch.randn(2, TOKENS, HEADS, generator=generator), torch.zeros_like(end), end


def rounded(x: Tensor) -> Tensor:
    """Each row over a power of two so that it fits, to e4m3 and back."""
    scale = 2 ** torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True) / 448))
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def test_selected_are_the_best_of_the_rounded_scores() -> None:
    q, k, weights, begin, end = arguments()
    found = Fp8Scores()(q, k, weights, begin, end, TOPK)
    wanted = torch.ops.mla2dsa.lightning_indexer(rounded(q), rounded(k), weights, begin, end, TOPK)
    assert bool((found == wanted).all())


def test_tiles_change_nothing_and_the_share_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, weights, begin, end = arguments()
    whole, tiled = Fp8Scores(), Fp8Scores()
    assert math.isnan(whole.same)
    expected = whole(q, k, weights, begin, end, TOPK)
    monkeypatch.setattr(fp8, "QUERY_ROWS", 7)
    assert bool((tiled(q, k, weights, begin, end, TOPK) == expected).all())
    exact = torch.ops.mla2dsa.lightning_indexer(q, k, weights, begin, end, TOPK)
    rows = (rows[:, TOPK:].flatten(0, 1).tolist() for rows in (expected, exact))
    same = [len(set(one) & set(two)) for one, two in zip(*rows, strict=True)]
    assert whole.same == tiled.same == sum(same) / (len(same) * TOPK)
    assert 0.8 < whole.same < 1


def test_what_fp8_holds_is_chosen_alike() -> None:
    q, k, weights, begin, end = arguments()
    scores = Fp8Scores()
    scores(rounded(q), rounded(k), weights, begin, end, TOPK)
    assert scores.same == 1
