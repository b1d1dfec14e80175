"""drop_casts: the same numbers with fewer nodes, and not one cast too many."""

import pytest
import torch
from drop_casts import DropCasts, Dropped
from torch import Tensor, nn

from mla2dsa.passes.manager import run_passes


class Idle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.float32) * 2).to(torch.float32)


class Needed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float64) * 2


class Copied(nn.Module):
    """What is written to must not be the input itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32, copy=True).mul_(2)


@pytest.mark.parametrize(("model", "dropped", "kept"), [(Idle(), 2, 0), (Needed(), 0, 1), (Copied(), 0, 1)])
def test_only_idle_casts_go(model: nn.Module, dropped: int, kept: int) -> None:
    x = torch.randn(2, 3)
    run = run_passes(torch.export.export(model, (x,)), [DropCasts()])
    assert run.fact(Dropped) == Dropped(dropped, kept)
    (step,) = run.steps
    assert step.nodes_before - step.nodes_after == dropped
    expected = model(x)
    result = run.program.module()(x)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)
