"""Normalize: the graph computes what it computed, without buffers that are written or regions without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import inputs_of, nodes_of, op_name, program_of
from torch import Tensor
from torch.export import ExportedProgram

from mla2dsa.passes.manager import Step, run_passes
from mla2dsa.passes.normalize import Normalize, Normalized

ROWS, COLUMNS = 3, 8


@dataclass(frozen=True)
class Done:
    before: ExportedProgram
    step: Step
    after: ExportedProgram
    changes: Normalized

    def assert_same(self, *given: Tensor) -> None:
        with torch.no_grad():
            torch.testing.assert_close(self.after.module()(*given), self.before.module()(*given), rtol=0, atol=0)

    def ops(self) -> list[str]:
        return [op_name(n) for n in self.after.graph.nodes if n.op == "call_function"]


def normalized(lines: Callable[..., Any], *inputs: Tensor) -> Done:
    return done_to(program_of(lines, *inputs, dynamic=(0,)))


def done_to(program: ExportedProgram) -> Done:
    run = run_passes(program, [Normalize()])
    return Done(program, run.steps[0], run.program, run.fact(Normalized))


def x_of(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# Buffers


def filled(x: Tensor, start: float = 0.0) -> Tensor:
    buffer = x.new_zeros(x.shape[0], COLUMNS)
    buffer[..., :5] = x[:, 3:]
    buffer[..., 5:] = x[:, :3] + start
    return buffer * 2


def test_writes_into_a_buffer_become_values() -> None:
    done = normalized(filled, x_of())
    assert done.changes == Normalized(grad_regions=0, buffer_fills=1)
    assert done.step.report.could_not == ()
    assert done.ops().count("slice_scatter") == 2
    assert "copy_" not in done.ops()
    for rows in (1, 2, 6):
        done.assert_same(x_of(rows, seed=rows))


@st.composite
def writes(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """(first, end, step, source's offset) of writes into the columns, one after the other; they may overlap."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, COLUMNS - 1))
        made.append((first, draw(st.integers(first + 1, COLUMNS)), draw(st.integers(1, 3)), draw(st.integers(0, 3))))
    return made


@settings(max_examples=25, deadline=None, derandomize=True)
@given(writes=writes(), along_rows=st.booleans(), broadcast=st.booleans(), rows=st.integers(1, 5))
def test_any_writes_leave_the_same_values(
    writes: list[tuple[int, int, int, int]], along_rows: bool, broadcast: bool, rows: int
) -> None:
    def lines(x: Tensor) -> Tensor:
        buffer = torch.zeros(2, x.shape[0], COLUMNS) if along_rows else x.new_zeros(x.shape[0], COLUMNS)
        for number, (first, end, step, offset) in enumerate(writes):
            part = torch.cat([x, x + number], -1)[:, offset : offset + len(range(first, end, step))]
            if broadcast:
                part = part[:, :1]
            buffer[..., first:end:step] = part
        return buffer.sin() if not along_rows else buffer.sum(0)

    done = normalized(lines, x_of())
    assert done.changes.buffer_fills == 1
    assert "copy_" not in done.ops()
    done.assert_same(x_of(rows, seed=1))


def other_type(x: Tensor) -> Tensor:
    buffer = torch.zeros(x.shape[0], COLUMNS, dtype=torch.float64)
    buffer[..., :4] = x[:, :4]
    buffer[..., 4:] = x[:, 4:].half()
    return buffer


def test_a_write_of_another_type_is_cast() -> None:
    done = normalized(other_type, x_of())
    assert done.changes.buffer_fills == 1
    done.assert_same(x_of(2, seed=1))


def read_between(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.shape[0], COLUMNS)
    buffer[..., :4] = x[:, :4]
    seen = buffer * 1
    buffer[..., 4:] = x[:, 4:]
    return seen + buffer


def read_through_an_older_view(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.shape[0], COLUMNS)
    view = buffer.view(-1)
    buffer[..., :4] = x[:, :4]
    return view + 1


def written_through_two_views(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.shape[0], COLUMNS)
    view = buffer[..., :4]
    view.copy_(x[:, :4])
    view.copy_(x[:, 4:])
    return buffer * 2


def written_by_row(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.shape[0], COLUMNS)
    buffer[0] = x[0]
    return buffer * 2


def written_through_a_view_of_a_view(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.shape[0], COLUMNS)
    buffer[:, :4] = x[:, :4]
    return buffer * 2


def written_and_used(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.shape[0], COLUMNS)
    return buffer[..., :4].copy_(x[:, :4]) + buffer[:, 4:]


def never_written(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], COLUMNS)[:, :4] + x[:, :4]


LEFT_ALONE = [
    read_between, read_through_an_older_view, written_through_two_views, written_by_row,
    written_through_a_view_of_a_view, written_and_used, never_written,
]  # fmt: skip


@pytest.mark.parametrize("lines", LEFT_ALONE, ids=lambda f: f.__name__)
def test_other_uses_of_memory_are_left_alone(lines: Callable[[Tensor], Tensor]) -> None:
    """The writes are still there, for the guard against writes to see."""
    done = normalized(lines, x_of())
    assert done.changes == Normalized(grad_regions=0, buffer_fills=0)
    assert done.ops() == [op_name(n) for n in done.before.graph.nodes if n.op == "call_function"]
    done.assert_same(x_of(seed=1))


def test_a_buffer_that_is_read_between_its_writes_is_named() -> None:
    done = normalized(read_between, x_of())
    (buffer,) = nodes_of(done.before, "new_zeros")
    assert done.step.report.could_not == (f"make {buffer.name} functional: it is read between the writes into it",)
    assert normalized(never_written, x_of()).step.report.could_not == ()


def test_two_buffers_are_two() -> None:
    done = normalized(lambda x: filled(x) + filled(x + 1, 3.0), x_of())
    assert done.changes.buffer_fills == 2
    done.assert_same(x_of(2, seed=1))


def filled_from_another(x: Tensor) -> Tensor:
    """The buffer that is made first is filled with the other one when that is complete."""
    first, second = (x.new_zeros(x.shape[0], COLUMNS) for _ in range(2))
    second[..., :4] = x[:, :4]
    second[..., 4:] = x[:, 4:]
    first[..., 1:] = second[..., 1:]
    return first


def filled_from_half_of_another(x: Tensor) -> Tensor:
    """... and before that is complete: it must not be taken for a reader of the whole."""
    first, second = (x.new_zeros(x.shape[0], size) for size in (COLUMNS + 1, COLUMNS))
    second[..., :4] = x[:, :4]
    first[..., 1:] = second
    second[..., 4:] = x[:, 4:]
    return first[:, 1:] + 10 * second


@pytest.mark.parametrize(("lines", "fills"), [(filled_from_another, 2), (filled_from_half_of_another, 1)])
def test_a_buffer_that_fills_another_is_read_where_it_stood(lines: Callable[[Tensor], Tensor], fills: int) -> None:
    done = normalized(lines, x_of())
    assert done.changes.buffer_fills == fills
    done.assert_same(x_of(2, seed=1))


def refilled_from_itself(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.shape[0], COLUMNS)
    buffer[..., :4] = x[:, :4]
    buffer[..., 4:] = buffer[..., :4] * 2
    return buffer


def changed_afterwards(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.shape[0], COLUMNS)
    buffer[..., :4] = x[:, :4]
    buffer.add_(1)
    return buffer * 2


def changed_afterwards_through_a_view(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.shape[0], COLUMNS)
    buffer[..., :4] = x[:, :4]
    torch.diagonal(buffer).fill_(5.0)
    return buffer * 2


AFTERWARDS = [refilled_from_itself, changed_afterwards, changed_afterwards_through_a_view]


@pytest.mark.parametrize("lines", AFTERWARDS, ids=lambda f: f.__name__)
def test_what_comes_between_or_afterwards_keeps_its_meaning(lines: Callable[[Tensor], Tensor]) -> None:
    normalized(lines, x_of()).assert_same(x_of(2, seed=1))


# Regions without gradients


def table(x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return x.cos(), x.sin()


def one_result(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.exp()
    return y + x


def two_results(x: Tensor) -> Tensor:
    cos, sin = table(x)
    return cos * 2 + sin


def second_result_only(x: Tensor) -> Tensor:
    with torch.no_grad():
        a, b = x.exp() + 1, x.sin()
        c = a.sum() * 0 + b
    return c + b


def input_returned(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.exp()
        z = x.view(-1)
    return y.view(-1) + z


def nested(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.cos()
        with torch.enable_grad():
            z = y * y.sin()
        w = z + y
    return w + x


def filled_inside(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = filled(x)
    return y + 1


REGIONS = {
    one_result: 1, two_results: 1, second_result_only: 1, input_returned: 1, nested: 2, filled_inside: 1,
}  # fmt: skip


def exported_with_gradients(lines: Callable[[Tensor], Tensor], x: Tensor) -> ExportedProgram:
    """As a caller without no_grad exports: the regions stay regions."""

    class Lines(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return lines(x)

    with torch.enable_grad():
        return torch.export.export(Lines(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)


@pytest.mark.parametrize(("lines", "count"), REGIONS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_regions_are_inlined(lines: Callable[[Tensor], Tensor], count: int) -> None:
    program = exported_with_gradients(lines, x_of())
    assert [n for n in program.graph.nodes if "set_grad_enabled" in str(n.target)]
    done = done_to(program)
    assert done.changes == Normalized(grad_regions=count, buffer_fills=int(lines is filled_inside))
    after = done.after
    assert not [n for n in after.graph.nodes if "set_grad_enabled" in str(n.target) or n.op == "get_attr"]
    for rows in (1, 4):
        x = x_of(rows, seed=rows)
        torch.testing.assert_close(after.module()(x), lines(x), rtol=0, atol=0)


def test_inlined_nodes_keep_their_values_and_inputs() -> None:
    after = done_to(exported_with_gradients(two_results, x_of())).after
    (x,) = inputs_of(after)
    for op in ("cos", "sin"):
        (node,) = nodes_of(after, op)
        assert (node.args, str(node.meta["val"].shape)) == ((x,), str(x.meta["val"].shape))


def test_a_graph_without_either_is_not_modified() -> None:
    done = normalized(lambda x: x.exp() + 1, x_of())
    assert done.changes == Normalized(grad_regions=0, buffer_fills=0)
