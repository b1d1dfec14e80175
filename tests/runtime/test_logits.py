"""Logits of which rows are made when they are asked for: each is that of the whole, where what they are made from stays as it is."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from saved import own_weights, tensors, whole
from torch import Tensor
from torch.export import ExportedProgram

from mla2dsa.passes.mla_to_dsa import prepare
from mla2dsa.runtime.execute import PieceRunner

SHAPES = [(1, 1, 0), (2, 9, 3), (1, 40, 0)]  # batch, length, left padding of the first row


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return families.export(families.build("deepseek_v3", num_hidden_layers=2))


@pytest.fixture(scope="module")
def cores(program: ExportedProgram) -> list[str]:
    return [site.core.out.name for site in prepare(program)[1].sites]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_logits_that_are_computed_late(
    program: ExportedProgram, cores: list[str], shape: tuple[int, int, int]
) -> None:
    """What they are made from is all that is kept of them, and each row is that of the whole."""
    sequence = tensors(families.inputs(*shape))
    loaded: list[str] = []
    load = own_weights(program)
    runner = PieceRunner(program, lambda name: loaded.append(name) or load(name), cores)  # type: ignore[func-returns-value]
    logits = next(runner.logits_of([sequence]))
    wanted = whole(program, sequence)
    assert "lm_head.weight" not in loaded
    assert logits.x.shape == (*wanted.shape[:2], 64)  # hidden_size
    for number, row in enumerate(wanted):
        torch.testing.assert_close(logits.rows(slice(None), number), row, rtol=0, atol=1e-6)
    first = logits.rows(slice(0, 1))
    torch.testing.assert_close(first, wanted[0, :1], rtol=0, atol=1e-6)
    assert loaded.count("lm_head.weight") == 1


def test_logits_that_are_no_linear_layers_are_given_whole(program: ExportedProgram) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).tanh()

    x = torch.randn(1, 5, 8)
    scaled = torch.export.export(Scaled().requires_grad_(False), (x,))
    runner = PieceRunner(scaled)
    logits = next(runner.logits_of([{"x": x}]))
    assert runner.projection is None
    assert torch.equal(logits.rows(slice(1, 3)), scaled.module()(x)[0, 1:3])


class WritesAfterwards(torch.nn.Module):
    """To what its head has read, or to the head's weight."""

    def __init__(self, weight: bool) -> None:
        super().__init__()
        self.to_weight = weight
        self.register_buffer("head", torch.randn(16, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.sin()
        logits = torch.nn.functional.linear(x, self.head)  # type: ignore[arg-type]
        (self.head if self.to_weight else x).add_(1.0)  # type: ignore[operator, union-attr]
        return logits, x


@pytest.mark.parametrize("weight", [False, True], ids=["hidden state", "weight"])
def test_logits_of_what_is_written_to_afterwards(weight: bool) -> None:
    model, x = WritesAfterwards(weight), torch.randn(1, 5, 8)
    written = torch.export.export(copy.deepcopy(model), (x,), strict=False)
    logits = next(PieceRunner(written).logits_of([{"x": x}]))
    torch.testing.assert_close(logits.rows(slice(None)), model(x)[0][0])
