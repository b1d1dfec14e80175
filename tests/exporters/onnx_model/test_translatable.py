"""Which in-place writes are made functional on the graph, which are left to the exporter, and which it would lose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from small_programs import op_name, program_of
from torch import Tensor
from torch.export import ExportedProgram

from mla2dsa.errors import UserError
from mla2dsa.exporters.onnx_model.translatable import Translatable, translatable

Lines = Callable[[Tensor], Tensor]


def x_of(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))


def ready(lines: Lines) -> tuple[ExportedProgram, ExportedProgram]:
    """(the program, what `translatable` makes of it), which compute the same."""
    program = program_of(lines, x_of(), dynamic=(0,))
    result = translatable(program, frozenset())
    for rows in (2, 5):
        with torch.no_grad():
            torch.testing.assert_close(result.module()(x_of(rows)), lines(x_of(rows)), rtol=0, atol=0)
    return program, result


def router(x: Tensor) -> Tensor:
    values, index = x.topk(2)
    values /= values.sum(-1, keepdim=True)
    return values + index


def twice(x: Tensor) -> Tensor:
    y = x * 2.0
    y.add_(1.0).mul_(x)
    return y + 1.0


def viewed_later(x: Tensor) -> Tensor:
    y = x * 2.0
    y.masked_fill_(x > 0, 3.0)
    return y.mT + 1.0


def read_before(x: Tensor) -> Tensor:
    y = x * 2.0
    before = y.exp()
    y.add_(1.0)
    return before + y


@pytest.mark.parametrize("lines", [router, twice, viewed_later, read_before], ids=lambda f: f.__name__)
def test_a_write_to_memory_of_its_own_becomes_a_value(lines: Lines) -> None:
    program, result = ready(lines)
    assert isinstance(result, Translatable)
    assert result.run_decompositions() is result
    assert not [n for n in result.graph.nodes if n.op == "call_function" and op_name(n).endswith("_")]
    assert [n for n in program.graph.nodes if n.op == "call_function" and op_name(n).endswith("_")], "it is a copy"


def through_a_view(x: Tensor) -> Tensor:
    y = x * 2.0
    y[:, :1].add_(1.0)
    return y + 1.0


def through_an_item(x: Tensor) -> Tensor:
    y = x * 2.0
    y.unbind(1)[1].fill_(5.0)
    return y + 1.0


def under_an_older_view(x: Tensor) -> Tensor:
    y = x * 2.0
    view = torch.diagonal(y)
    y.add_(1.0)
    return view + 1.0


def out_argument(x: Tensor) -> Tensor:
    y = x * 2.0
    torch.mul(y, x, out=y)
    return y + 1.0


def foreach(x: Tensor) -> Tensor:
    y, z = x * 2.0, x * 3.0
    torch._foreach_add_([y, z], 1.0)
    return y + z


def of_another_type(x: Tensor) -> Tensor:
    """The product of half and float is float, but not in place."""
    y = (x * 2.0).half()
    y.mul_(x)
    return y + 1.0


@pytest.mark.parametrize(
    "lines",
    [through_a_view, through_an_item, under_an_older_view, out_argument, foreach, of_another_type],
    ids=lambda f: f.__name__,
)
def test_other_writes_are_left_to_the_exporter(lines: Lines) -> None:
    _, result = ready(lines)
    assert not isinstance(result, Translatable)


@pytest.mark.parametrize("lines", [through_a_view, under_an_older_view], ids=lambda f: f.__name__)
def test_the_exporter_makes_them_functional(lines: Lines, tmp_path: Path) -> None:
    program, result = ready(lines)
    path = tmp_path / "model.onnx"
    exported = torch.onnx.export(result, (x_of(),), dynamo=True, verbose=False)
    assert exported is not None
    exported.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x_of().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), program.module()(x_of()))


def writes_to_its_input(x: Tensor) -> Tensor:
    x.add_(1.0)
    return x * 2.0


def test_a_write_to_an_input_is_left_to_the_exporter() -> None:
    program = program_of(writes_to_its_input, x_of(), dynamic=(0,))
    assert not isinstance(translatable(program, frozenset()), Translatable)


def under_dropout(x: Tensor) -> Tensor:
    y = x * 2.0
    seen = torch.dropout(y, 0.5, False)
    y.add_(1.0)
    return seen + 1.0


def through_einsum(x: Tensor) -> Tensor:
    y = x * 2.0
    torch.einsum("ij->ji", y).mul_(3.0)
    return y + 1.0


@pytest.mark.parametrize(
    ("lines", "op"),
    [(under_dropout, "aten.dropout.default"), (through_einsum, "aten.einsum.default")],
    ids=["dropout", "einsum"],
)
def test_a_write_that_the_exporter_would_lose_is_refused(lines: Lines, op: str) -> None:
    program = program_of(lines, x_of(), dynamic=(0,))
    with pytest.raises(UserError, match=rf"^the in-place write \w+_ .*through \w+ \({op}\).*: write out of place"):
        translatable(program, frozenset())
