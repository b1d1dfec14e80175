"""graph_eval: what a piece of graph computes on concrete values is what the program itself computes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import inputs_of, node_of, nodes_of, outputs_of, program_of
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from mla2dsa.passes.graph.graph_eval import (
    CannotEvaluate,
    ancestors,
    carries_tensors,
    concrete,
    concrete_shape,
    evaluate,
    integers,
    is_move,
    is_tensor,
    linear_parts,
    nearest_linears,
    node_symbols,
    symbols,
    value,
)

aten = torch.ops.aten

# Sizes


def size_symbols() -> tuple[Any, Any]:
    env = ShapeEnv()
    made = []
    for name, hint in (("a", 7), ("b", 5)):
        source = ConstantSource(name)
        made.append(
            env.create_symintnode(
                env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC), hint=hint, source=source
            )
        )
    return made[0], made[1]


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "max": torch.sym_max, "min": torch.sym_min,
}  # fmt: skip
BY_NUMBER: dict[str, Callable[[Any, int], Any]] = {"//": operator.floordiv, "%": operator.mod}
Formula = Callable[[Any, Any], Any]  # of two sizes


@st.composite
def formulas(draw: st.DrawFn, depth: int = 4) -> tuple[str, Formula]:
    """A random formula of two sizes, with its spelling for the report."""
    kind = draw(st.sampled_from(["a", "b", "number", *(() if depth == 0 else (*BINARY, *BY_NUMBER))]))
    if kind in ("a", "b"):
        return kind, (lambda a, b: a) if kind == "a" else (lambda a, b: b)
    if kind == "number":
        number = draw(st.integers(-9, 9))
        return str(number), lambda a, b: number
    text, left = draw(formulas(depth - 1))
    if kind in BY_NUMBER:
        divisor = draw(st.integers(1, 9))
        return f"({text} {kind} {divisor})", lambda a, b: BY_NUMBER[kind](left(a, b), divisor)
    other, right = draw(formulas(depth - 1))
    return f"({text} {kind} {other})", lambda a, b: BINARY[kind](left(a, b), right(a, b))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(formula=formulas(), a=st.integers(2, 60), b=st.integers(2, 60))
def test_a_size_is_what_python_makes_of_it(formula: tuple[str, Formula], a: int, b: int) -> None:
    first, second = size_symbols()
    size = formula[1](first, second)
    env = {first.node.expr: a, second.node.expr: b}
    assert concrete(size, env) == formula[1](a, b), formula[0]
    assert symbols(size) <= set(env)


def test_a_size_without_its_symbol_has_no_value() -> None:
    first, second = size_symbols()
    with pytest.raises(CannotEvaluate, match=r"^size .* has no value here$"):
        concrete(first * 2 + second, {first.node.expr: 3})
    assert concrete(3, {}) == 3


def test_integers_of_an_argument() -> None:
    first, _ = size_symbols()
    assert integers([1, (2, [3])]) == [1, 2, 3]
    assert sorted(integers(first * 4 + 6)) == [4, 6]
    assert integers([True, 2.0, None, "x"]) == []


def test_integers_of_a_node_are_those_of_its_size() -> None:
    program = program_of(lambda x: torch.zeros(x.shape[1] * 3 + 5), torch.zeros(2, 7))
    (size,) = [n for n in program.graph.nodes if n.target is operator.add]
    assert sorted(integers(size)) == [3, 5]


def test_node_symbols_are_those_of_shapes_and_sizes() -> None:
    program = program_of(lambda x, y: (x.sum(0), torch.zeros(y.shape[0])), torch.zeros(2, 7), torch.zeros(3, 4))
    x, y = inputs_of(program)
    names = [str(size) for node in (x, y) for size in value(node).shape]
    assert [str(s) for s in node_symbols([x, y])] == sorted(names)
    (size,) = [n for n in program.graph.nodes if n.target is aten.sym_size.int]
    assert node_symbols([size]) == node_symbols([y])[:1]
    assert concrete_shape(x, dict(zip(node_symbols([x]), (4, 9), strict=True))) == [4, 9]


# Running


def attention(q: Tensor, mask: Tensor) -> Tensor:
    """Views, casts, sizes, constants, lists: a bit of everything that masks and keys are made of."""
    length = mask.shape[1]
    i = torch.arange(length)
    visible = (i[None] <= i[:, None])[None] & mask.bool()[:, None]
    bias = torch.where(visible, 0.0, float("-inf"))
    first, second = q.to(torch.float16).float().split([3, 5], -1)
    parts = torch.cat([second * 2, first.unsqueeze(-1).expand(-1, -1, -1, 2).flatten(2)], -1)
    return torch.softmax(parts @ parts.mT + bias, -1) @ parts


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batch=st.integers(1, 5), length=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_piece_computes_what_the_program_does(batch: int, length: int, seed: int) -> None:
    """In float64, and on values that half precision holds, so that skipped casts lose nothing."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-4, 5, (batch, length, 8), generator=g).double()
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    program, inputs, env = attention_program()
    sizes = dict(zip(env, (batch, length), strict=True))
    (got,) = evaluate(outputs_of(program), dict(zip(inputs, (q, mask), strict=True)), sizes)
    real = mask.bool()
    torch.testing.assert_close(got[real], attention(q, mask).double()[real], rtol=0, atol=1e-6)
    assert got.dtype == torch.float64


@functools.cache
def attention_program() -> tuple[ExportedProgram, list[Node], list[Any]]:
    program = program_of(attention, torch.zeros(2, 7, 8), torch.ones(2, 7, dtype=torch.long))
    inputs = inputs_of(program)
    return program, inputs, [size.node.expr for size in value(inputs[0]).shape[:2]]


def test_a_piece_may_start_anywhere() -> None:
    program = program_of(lambda x: (x * 3).exp() + 1, torch.zeros(2, 3))
    (got,) = evaluate(outputs_of(program), {node_of(program, "exp"): torch.tensor([4.0])}, {})
    assert got.tolist() == [5.0]


def test_a_value_that_was_not_fed_is_named() -> None:
    program = program_of(lambda x, y: x + y, torch.zeros(2, 3), torch.zeros(2, 3))
    x, y = inputs_of(program)
    with pytest.raises(CannotEvaluate, match=f"^{y.name} has no value here$"):
        evaluate(outputs_of(program), {x: torch.zeros(2, 3)}, {})


def test_a_weight_that_was_not_fed_is_named() -> None:
    program = program_of(nn.Linear(3, 3), torch.zeros(2, 3), dynamic=(0,))
    with pytest.raises(CannotEvaluate, match=r"^p_(weight|bias) has no value here$"):
        evaluate(outputs_of(program), {inputs_of(program)[0]: torch.zeros(2, 3)}, {})


def test_an_op_that_does_not_run_is_named_with_what_it_says() -> None:
    program = program_of(lambda x: x.view(2, 3) @ x.view(3, 2), torch.zeros(6), dynamic=None)
    node = nodes_of(program, "view")[0]
    with pytest.raises(CannotEvaluate, match=rf"^{node.name} cannot be run on its own: shape '\[2, 3\]' is invalid.*$"):
        evaluate([node], {inputs_of(program)[0]: torch.zeros(5)}, {})


def test_uninitialised_memory_is_nan_and_zeros_are_zeros() -> None:
    program = program_of(lambda x: (x.new_empty(2, 3), torch.empty_like(x), torch.zeros_like(x)), torch.zeros(2, 3))
    x = inputs_of(program)[0]
    env = dict(zip(node_symbols([x]), (4, 3), strict=True))
    empty, like, zeros = evaluate(outputs_of(program), {x: torch.ones(4, 3)}, env)
    assert (tuple(empty.shape), bool(empty.isnan().all())) == ((2, 3), True)
    assert (tuple(like.shape), bool(like.isnan().all())) == ((4, 3), True)
    assert zeros.eq(0).all()


TAG = 2**40 + 1.0  # no float narrower than float64 holds it
WIDE = torch.tensor([TAG], dtype=torch.float64)


@pytest.mark.parametrize(
    ("cast", "given", "expected"),
    [
        (lambda x: x.to(torch.float16), WIDE, WIDE),
        (lambda x: x.bfloat16().float(), WIDE, WIDE),
        (lambda x: x.type_as(x.half()), WIDE, WIDE),
        (lambda x: x.to(torch.complex64).real, WIDE, WIDE),
        (lambda x: torch.complex(x, x).to(torch.complex64).imag, WIDE, WIDE),
        (lambda x: x.to(torch.int64), torch.tensor([2.75]), torch.tensor([2])),
        (lambda x: x.bool(), torch.tensor([0.5, 0.0]), torch.tensor([True, False])),
    ],
    ids=["half", "bfloat16 and back", "type_as", "to complex", "complex", "to integers", "to bool"],
)
def test_casts_between_floats_are_skipped_and_others_are_not(
    cast: Callable[[Tensor], Tensor], given: Tensor, expected: Tensor
) -> None:
    program = program_of(cast, torch.zeros(2))
    (got,) = evaluate(outputs_of(program), {inputs_of(program)[0]: given}, {})
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_integers_become_float64() -> None:
    program = program_of(lambda x: x.half(), torch.zeros(2, dtype=torch.long))
    (got,) = evaluate(outputs_of(program), {inputs_of(program)[0]: torch.tensor([2**30 + 1])}, {})
    assert (got.dtype, got.tolist()) == (torch.float64, [2**30 + 1])


def test_a_graph_of_another_device_runs_on_the_cpu() -> None:
    program = program_of(
        lambda x: x + torch.arange(x.shape[1], device=x.device), torch.zeros(2, 3, device="meta", dtype=torch.long)
    )
    (x,) = inputs_of(program)
    env = dict(zip([s.node.expr for s in value(x).shape], (1, 4), strict=True))
    (got,) = evaluate(outputs_of(program), {x: torch.zeros(1, 4, dtype=torch.long)}, env)
    assert got.tolist() == [[0, 1, 2, 3]]


def test_pinned_memory_is_not_asked_for() -> None:
    graph = Graph()
    node = graph.call_function(aten.full.default, ([2], 3.0), {"pin_memory": True})
    node.meta["val"] = torch.full([2], 3.0)
    assert evaluate([node], {}, {})[0].tolist() == [3.0, 3.0]


def test_a_long_chain_is_not_too_deep() -> None:
    graph = Graph()
    node = first = graph.placeholder("x")
    node.meta["val"] = torch.zeros(1)
    for _ in range(5000):
        node = graph.call_function(aten.add.Tensor, (node, 1))
        node.meta["val"] = torch.zeros(1)
    assert evaluate([node], {first: torch.zeros(1)}, {})[0].item() == 5000
    assert len(ancestors(node)) == 5001


# Reading


MOVES: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(-1, 2, 4), "transpose": lambda x: x.transpose(0, 1), "expand": lambda x: x[None].expand(3, -1, -1),
    "cat": lambda x: torch.cat([x, x]), "slice": lambda x: x[1:], "split": lambda x: x.split([3, 5], -1)[0],
    "stack": lambda x: torch.stack([x, x]), "repeat": lambda x: x.repeat(2, 1), "select": lambda x: x[0],
    "same dtype": lambda x: x.to(torch.float32, copy=True), "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:1], 0, 0, 1), "new_zeros": lambda x: x.new_zeros(2, 2),
}  # fmt: skip
NO_MOVES: dict[str, Callable[[Tensor], Any]] = {
    "mul": lambda x: x * 2, "other dtype": lambda x: x.half(), "sum": lambda x: x.sum(0), "gather": lambda x: x[[1, 0]],
    "flip": lambda x: x.flip(0), "cumsum": lambda x: x.cumsum(0), "linear": lambda x: F.linear(x, x),
    "roll": lambda x: x.roll(1, 0), "where": lambda x: torch.where(x > 0, x, x),
}  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "moves"), [(f, True) for f in MOVES.values()] + [(f, False) for f in NO_MOVES.values()],
    ids=[*MOVES, *NO_MOVES],
)  # fmt: skip
def test_what_only_moves_data(lines: Callable[[Tensor], Any], moves: bool) -> None:
    (out,) = outputs_of(program_of(lines, torch.zeros(4, 8), dynamic=None))
    assert is_move(out) is moves


def test_an_input_is_no_move() -> None:
    (x,) = inputs_of(program_of(lambda x: x.clone(), torch.zeros(2, 3)))
    assert not is_move(x)
    assert is_tensor(x)
    assert carries_tensors(x)


def test_a_split_carries_tensors_and_a_size_does_not() -> None:
    program = program_of(lambda x: (x.split(3, -1)[1], torch.zeros(x.shape[0])), torch.zeros(2, 6), dynamic=(0,))
    split, size = node_of(program, "split"), node_of(program, "sym_size")
    assert (is_tensor(split), carries_tensors(split)) == (False, True)
    assert (is_tensor(size), carries_tensors(size)) == (False, False)


@pytest.mark.parametrize("bias", [False, True])
def test_the_parts_of_a_linear_layer(bias: bool) -> None:
    program = program_of(nn.Linear(3, 5, bias=bias), torch.zeros(2, 3), dynamic=(0,))
    source, weight, added = linear_parts(node_of(program, "linear"))  # type: ignore[misc]
    assert (source, weight.name) == (inputs_of(program)[0], "p_weight")
    assert (added.name if added is not None else None) == ("p_bias" if bias else None)


def test_the_parts_of_a_linear_layer_by_keyword() -> None:
    graph = Graph()
    x, weight, bias = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    node = graph.call_function(aten.linear.default, (x,), {"bias": bias, "weight": weight})
    assert linear_parts(node) == (x, weight, bias)
    assert linear_parts(graph.call_function(aten.linear.default, (x, weight))) == (x, weight, None)


def test_other_products_are_no_linear_layers() -> None:
    program = program_of(lambda x: x @ x.mT, torch.zeros(2, 3))
    assert [linear_parts(node) for node in program.graph.nodes] == [None] * len(program.graph.nodes)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below, self.left, self.right = (nn.Linear(3, 3, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.below(x).tanh()
        return self.left(x) * 2 + self.right(x.exp())


def test_only_the_nearest_linear_layers_count() -> None:
    program = program_of(Stacked(), torch.zeros(2, 3), dynamic=(0,))
    weights = {linear_parts(node)[1].name for node in nearest_linears(outputs_of(program)[0])}  # type: ignore[index]
    assert weights == {"p_left_weight", "p_right_weight"}
    (below,) = nearest_linears(node_of(program, "tanh"))
    assert nearest_linears(below) == [below]
    assert nearest_linears(inputs_of(program)[0]) == []


def test_ancestors_stop_where_they_are_told() -> None:
    program = program_of(lambda x, y: (x.exp() + y).tanh(), torch.zeros(2, 3), torch.zeros(2, 3))
    (x, y), tanh = inputs_of(program), node_of(program, "tanh")
    assert set(ancestors(tanh)) == {tanh, node_of(program, "add"), node_of(program, "exp"), x, y}
    stopped = ancestors(tanh, stop=lambda node: node is node_of(program, "exp"))
    assert x not in stopped
    assert next(iter(stopped)) is tanh
