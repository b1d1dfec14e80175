"""Complex rotary tables as pairs of real numbers: the same values, and no complex node left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_programs import program_of
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.exporters.onnx_model.translatable import Translatable, translatable

Lines = Callable[[Tensor], Tensor]


def x_of(rows: int) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))


def rotated(x: Tensor) -> Tensor:
    """As DeepSeek-V2 rotates: one table, scaled, broadcast over heads."""
    table = torch.polar(torch.ones_like(x[:, :2]), x[:, 2:]) * 1.5
    z = torch.view_as_complex(x.reshape(-1, 2, 2)).unsqueeze(1)
    return torch.view_as_real(z * table.unsqueeze(1)).flatten(2)


def read_twice(x: Tensor) -> Tensor:
    """The table as numbers and as a factor."""
    table = torch.polar(x[:, :2], x[:, 2:])
    parts = torch.view_as_real(table)
    return torch.view_as_real(table * table) + parts


def from_behind(x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.reshape(-1, 2, 2))
    return torch.view_as_real(z.unsqueeze(-1)).squeeze(-2)


def without(x: Tensor) -> Tensor:
    return x.cos() * 2.0


@pytest.mark.parametrize("lines", [rotated, read_twice, from_behind, without], ids=lambda f: f.__name__)
def test_real_numbers_compute_the_same(lines: Lines) -> None:
    result = translatable(program_of(lines, x_of(3), dynamic=(0,)), frozenset())
    assert isinstance(result, Translatable)
    values = [node.meta["val"] for node in result.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert not any(value.is_complex() for value in values)
    for rows in (2, 5):
        with torch.no_grad():
            torch.testing.assert_close(result.module()(x_of(rows)), lines(x_of(rows)))


def added(x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.reshape(-1, 2, 2))
    return torch.view_as_real(z + z)


def by_a_real(x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.reshape(-1, 2, 2))
    return torch.view_as_real(z * x[:, :2])


@pytest.mark.parametrize("lines", [added, by_a_real], ids=lambda f: f.__name__)
def test_what_has_no_rule_is_named(lines: Lines) -> None:
    with pytest.raises(UserError, match=r"(add|mul).* on complex numbers has no form in ONNX"):
        translatable(program_of(lines, x_of(3), dynamic=(0,)), frozenset())
