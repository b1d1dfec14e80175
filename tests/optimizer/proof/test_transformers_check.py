"""Comparing with transformers over equal selections: ours are taken, and held against its own scores."""

import pytest
import torch
from torch import Tensor

from mla2dsa.optimizer.proof.transformers_check import LowestSlotTies, SameSelection

NEVER = -torch.inf


def causal(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), NEVER)


def selection(rows: list[list[int]]) -> Tensor:
    return torch.tensor([rows], dtype=torch.int32)


SCORES = causal(torch.tensor([[[1.0, 0, 0, 0], [4, 2, 0, 0], [5, 3, 2.9999, 0], [8, 1, 2, 0.5]]]))
BEST = selection([[0, -1], [0, 1], [0, 1], [0, 2]])


@pytest.mark.parametrize(
    ("ours", "shortfall"),
    [
        (BEST, 0.0),
        (selection([[0, -1], [0, 1], [0, 2], [0, 2]]), 0.0001 / 5),  # all but a tie
        (selection([[0, -1], [0, 1], [0, 1], [0, 3]]), 1.5 / 8),  # a wrong key
        (selection([[0, -1], [0, 1], [0, 1], [0, -1]]), torch.inf),
        (selection([[0, -1], [1, -1], [0, 1], [0, 2]]), torch.inf),
    ],
    ids=["same", "near-tie", "wrong", "fewer", "fewer-of-few"],
)
def test_shortfall(ours: Tensor, shortfall: float) -> None:
    mode = SameSelection([ours])
    with mode:
        taken = SCORES.topk(2, dim=-1).indices
    assert mode.shortfall == pytest.approx(shortfall, abs=1e-6)
    assert mode.used == 1
    real = ours >= 0
    assert torch.equal(taken[real], ours[real].long())
    assert bool(
        (SCORES.gather(-1, taken)[~real & (torch.arange(4) < 2)[None, :, None]] == NEVER).all()
    )  # unused: unseen


def test_a_nan_score_is_not_zero_shortfall() -> None:
    scores = SCORES.clone()
    scores[0, 3, 0] = torch.nan
    mode = SameSelection([BEST])
    with mode:
        scores.topk(2, dim=-1)
    assert not mode.shortfall <= 1.0


def test_routers_are_left_alone() -> None:
    """Group routing uses a 3-D topk too, of [tokens, groups, experts in a group]."""
    routed = torch.rand(5, 4, 2)
    mode = SameSelection([])
    with mode:
        found = routed.topk(2, dim=-1)
    assert torch.equal(found.values, routed.topk(2, dim=-1).values)
    assert mode.used == 0


def test_ties_go_to_the_lowest_slot() -> None:
    with LowestSlotTies():
        assert torch.zeros(1, 3, 64).topk(5, dim=-1).indices.tolist() == [[list(range(5))] * 3]
