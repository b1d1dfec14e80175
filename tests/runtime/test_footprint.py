"""Footprint: what is counted from a graph is what running it takes."""

from __future__ import annotations

import families
import pytest
import torch
from torch import Tensor
from torch.export import Dim

from mla2dsa.runtime.execute import PieceRunner
from mla2dsa.runtime.footprint import Footprint, Footprints


class Doubled(torch.nn.Module):
    """[B, T, 8] -> [B, T, 4], with a value that lives long and a view that keeps its base alive."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 16, bias=False)
        self.down = torch.nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.up(x)  # 64 bytes a token
        half = wide[..., :8]  # a view
        again = half.cos()  # 32 bytes
        both = torch.cat([again, half], -1)  # 64 bytes, while 64 + 32 are alive
        return self.down(both)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def counted() -> Footprint:
    shapes = {"x": {0: Dim("batch", min=1, max=8), 1: Dim("seq", min=1, max=4096)}}
    program = torch.export.export(Doubled().requires_grad_(False), (torch.ones(2, 3, 8),), dynamic_shapes=shapes)
    return Footprints(PieceRunner(program)).at(100)[0]


def test_values_live_as_long_as_their_views(counted: Footprint) -> None:
    assert counted.peak == 100 * (64 + 32 + 64)


def test_weights_and_operations(counted: Footprint) -> None:
    assert counted.weights == 4 * (8 * 16 + 16 * 4)
    assert counted.flops == 2 * 100 * (8 * 16 + 16 * 4)
    assert (counted.carried, counted.watched) == (0, 0)


def test_what_is_carried_and_watched_is_counted() -> None:
    program = families.export(families.build("deepseek_v3", num_hidden_layers=2))
    plain = Footprints(PieceRunner(program)).at(100)[0]
    cores = [node.name for node in program.graph.nodes if "scaled_dot_product" in node.name]
    first, second, _ = Footprints(PieceRunner(program, cores=cores), [cores[1]]).at(100)
    assert first.carried >= 100 * 64 * 4  # the residual
    assert first.flops < plain.flops
    assert (first.watched, second.watched) == (0, 100 * 4 * 12 * 4)  # heads, v_head_dim, float32


@pytest.mark.parametrize("length", [50, 400])
def test_it_grows_with_the_length(length: int) -> None:
    program = families.export(families.build("deepseek_v3", num_hidden_layers=2))
    both = Footprints(PieceRunner(program))
    short, long = both.at(length)[0], both.at(2 * length)[0]
    assert short.weights == long.weights
    assert 1.9 * short.peak < long.peak < 4.1 * short.peak
    assert 1.9 * short.flops < long.flops


def test_layers_of_one_kind_are_looked_at_once() -> None:
    program = families.export(families.build("deepseek_v3", num_hidden_layers=6))
    cores = [node.name for node in program.graph.nodes if "scaled_dot_product" in node.name]
    footprints = Footprints(PieceRunner(program, cores=cores))
    assert len(footprints.at(100)) == 7
    assert len(footprints._kinds) < 6  # before the first core, dense and sparse MLPs, behind the last


def test_logits_and_head_that_are_late_are_not_counted() -> None:
    program = families.export(families.build("deepseek_v3", num_hidden_layers=2))
    runner = PieceRunner(program)
    (plain,), (late,) = Footprints(runner).at(4096), Footprints(runner, late=True).at(4096)
    assert Footprints(runner, late=True).head == plain.weights - late.weights == 4 * 64 * families.VOCAB
    assert late.flops == plain.flops
    assert late.peak <= plain.peak
    alone = torch.export.export(torch.nn.Linear(8, 512, bias=False).requires_grad_(False), (torch.ones(1, 4, 8),))
    head = PieceRunner(alone)
    assert Footprints(head).at(4)[0].peak - Footprints(head, late=True).at(4)[0].peak == 4 * 4 * 512
