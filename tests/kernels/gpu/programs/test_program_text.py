"""Programs as text: what is written is read back, and anything else is refused with the line it is in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT

from mla2dsa.errors import UserError
from mla2dsa.kernels.gpu.programs.expression_text import (
    read_expression,
    repeated,
    variables,
    write_expression,
)
from mla2dsa.kernels.gpu.programs.program import (
    Expr,
    Launch,
    LaunchProgram,
    Repeat,
    Tensor,
    Variant,
    Workspace,
    ceil_div,
    dim,
    integer,
    maximum,
    minimum,
    variable,
)
from mla2dsa.kernels.gpu.programs.program_text import read_program, write_program

SHAPES = ((3, 700, 16), (3, 900))


def expressions(names: tuple[str, ...] = ()) -> st.SearchStrategy[Expr]:
    leaves = [
        st.integers(-(2**40), 2**40).map(integer),
        st.builds(dim, st.integers(0, 1), st.integers(0, 1)),
        *(st.just(variable(name)) for name in names),
    ]
    operators = st.sampled_from(["+", "-", "*", "//", "ceil", "min", "max"])
    return st.recursive(
        st.one_of(leaves),
        lambda part: st.builds(lambda op, a, b: Expr(op, (a, b)), operators, part, part),
        max_leaves=12,
    )


def launches(names: tuple[str, ...] = ()) -> st.SearchStrategy[Launch]:
    values = expressions(names)
    by_type = {
        "*bf16": st.one_of(st.builds(Tensor, st.integers(0, 3), values), st.builds(Workspace, values)),
        "i32": values,
        "i64": values,
        "fp32": st.floats(width=32, allow_nan=False),
    }

    @st.composite
    def build(draw: st.DrawFn) -> Launch:
        kinds = draw(st.lists(st.sampled_from(sorted(by_type)), min_size=1, max_size=5))
        arguments = tuple((f"a{number}", kind) for number, kind in enumerate(kinds))
        kernel = draw(st.sampled_from(["one", "two"]))
        variant = Variant(kernel, (("BLOCK", len(kinds)),), arguments, frozenset(), 4, 1)
        grid = draw(st.tuples(values, values, values))
        return Launch(variant, grid, tuple(draw(by_type[kind]) for kind in kinds))

    return build()


def programs() -> st.SearchStrategy[LaunchProgram]:
    loops = st.builds(
        Repeat,
        st.just("t"),
        expressions(),
        expressions(),
        st.lists(launches(("t",)), min_size=1, max_size=3).map(tuple),
    )
    outputs = st.tuples(st.just("i32"), st.lists(expressions(), max_size=3).map(tuple))
    return st.builds(
        LaunchProgram,
        st.lists(st.sampled_from(["bf16", "i64"]), max_size=3).map(tuple),
        st.lists(outputs, max_size=2).map(tuple),
        expressions(),
        st.lists(st.one_of(launches(), loops), max_size=3).map(tuple),
    )


def round_trip(program: LaunchProgram) -> LaunchProgram:
    names: dict[Variant, str] = {}
    lines = write_program(program, lambda variant: names.setdefault(variant, f"{variant.kernel}-{len(names)}"))
    assert all(line == " ".join(line.split()) for line in lines)
    return read_program(lines, {name: variant for variant, name in names.items()})


@given(expressions(("t", "block_2")))
def test_expressions_are_read_back(expr: Expr) -> None:
    text = write_expression(expr)
    assert " " not in text
    assert read_expression(text) == expr


@given(programs())
@settings(max_examples=150, deadline=None)
def test_programs_are_read_back(program: LaunchProgram) -> None:
    assert round_trip(program) == program


@given(st.lists(expressions(("t",)), min_size=1, max_size=4))
def test_names_say_the_same_in_less(exprs: list[Expr]) -> None:
    names: dict[Expr, str] = {}
    definitions: dict[str, Expr] = {}
    for expr in repeated([*exprs, *exprs]):
        name = f"x{len(names)}"
        definitions[name] = read_expression(write_expression(expr, names), definitions)
        names[expr] = name
        assert definitions[name] == expr
    for expr in exprs:
        text = write_expression(expr, names)
        assert read_expression(text, definitions) == expr
        assert len(text) <= len(write_expression(expr))


@pytest.mark.parametrize(
    ("expr", "text", "value"),
    [
        ((dim(0, 1) + 3) // 4, "d0.1,3,+,4,/", 175),
        (ceil_div(dim(0, 1), 256) * 2, "d0.1,256,^,2,*", 6),
        (minimum(2048, dim(1, 1)) - variable("t"), "2048,d1.1,<,vt,-", 890),
        (maximum(dim(0, 0), 1 - dim(0, 0)), "d0.0,1,d0.0,-,>", 3),
        (integer(3) + 4, "7", 7),
    ],
    ids=str,
)
def test_expressions_read_like_this(expr: Expr, text: str, value: int) -> None:
    assert write_expression(expr) == text
    assert read_expression(text).value(SHAPES, {"t": 10}) == value


def test_variables_are_found() -> None:
    assert variables(dim(0, 0) * (variable("t") + variable("u"))) == {"t", "u"}
    assert variables(dim(0, 0)) == frozenset()


COPY = Variant(
    "copy", (), (("x", "*bf16"), ("out", "*bf16"), ("n", "i32"), ("m", "i64"), ("s", "fp32")), frozenset(), 4, 1
)


def test_a_program_reads_like_this() -> None:
    tile = ceil_div(dim(0, 1), 4) * 4
    first = variable("t")
    step = Launch(
        COPY,
        (minimum(tile, dim(0, 1) - first), integer(1), integer(1)),
        (Tensor(0, first * 2), Workspace(integer(0)), minimum(tile, dim(0, 1) - first), dim(0, 0), 1.0),
    )
    program = LaunchProgram(
        ("bf16",), (("bf16", (dim(0, 0), integer(8))),), tile * 2, (Repeat("t", dim(0, 1), tile, (step,)),)
    )
    lines = write_program(program, lambda variant: variant.kernel)
    assert lines == [
        "mla2dsa 1",
        "in bf16",
        "out bf16 d0.0 8",
        "let x0 d0.1,4,^,4,*",
        "workspace x0,2,*",
        "repeat t d0.1 x0",
        "let x1 x0,d0.1,vt,-,<",
        "launch copy x1 1 1 t0@vt,2,* w0 ix1 ld0.0 f3f800000 n n",
        "end",
    ]
    assert read_program(lines, {"copy": COPY}) == program


@pytest.mark.parametrize("text", ["", "1,", "+", "1,+", "1,2", "d0", "d-1.0", "x0", "v", "v1", "1.5", "1,2,%", "d٣.1"])
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="expression"):
        read_expression(text)


GOOD = ["mla2dsa 1", "in bf16", "workspace 0", "launch copy 1 1 1 t0 w0 i1 l1 f00000000 n n"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "line 1: expected 'mla2dsa 1'"),
        (["mla2dsa 2"], "line 1: expected 'mla2dsa 1'"),
        (["mla2dsa 1"], "no workspace line"),
        ([*GOOD, "jump"], "line 5: 'jump' is not known"),
        ([*GOOD, "end"], "line 5: 'end' is not known"),
        ([*GOOD, "let y 1"], "line 5: 'let y 1' is not known"),
        ([*GOOD, "let x0 1", "let x0 2"], "line 6: 'let x0 2' is not known"),
        ([*GOOD, "let x1 x0"], "line 5: expression 'x0': 'x0' is not known"),
        ([*GOOD, "repeat t 1 1"], "repeat without end"),
        ([*GOOD, "repeat t 1 1", "repeat u 1 1"], "line 6: 'repeat u 1 1' is not known"),
        ([*GOOD, "repeat t 1 1", "let x0 vt", "end", "workspace x0"], "line 8: expression 'x0'"),
        ([*GOOD, GOOD[3].replace("copy", "move")], "line 5: kernel move is not in the pack"),
        ([*GOOD, GOOD[3].removesuffix(" n")], "line 5: copy takes 5 arguments and two nulls"),
        ([*GOOD, GOOD[3].replace("w0 ", "")], "line 5: copy takes 5 arguments and two nulls"),
        ([*GOOD, GOOD[3].replace("t0", "i0")], "line 5: argument 'i0' does not fit type [*]bf16"),
        ([*GOOD, GOOD[3].replace("i1", "l1")], "line 5: argument 'l1' does not fit type i32"),
        ([*GOOD, GOOD[3].replace("f00000000", "f0")], "line 5: argument 'f0' does not fit type fp32"),
        ([*GOOD, GOOD[3].replace("t0", "tx")], "line 5: argument 'tx' does not fit type [*]bf16"),
    ],
)
def test_other_programs_are_refused(lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_program(lines, {"copy": COPY})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Tensor(0),), "takes 5 arguments, the launch has 1"),
        ((Tensor(0), integer(1), integer(1), integer(1), 1.0), "argument out of type [*]bf16 cannot be Expr"),
        ((Tensor(0), Tensor(1), 1.0, integer(1), 1.0), "argument n of type i32 cannot be float"),
        ((Tensor(0), Tensor(1), integer(1), integer(1), integer(1)), "argument s of type fp32 cannot be Expr"),
    ],
    ids=["count", "pointer", "integer", "float"],
)
def test_a_launch_that_does_not_fit_its_kernel_is_not_written(
    arguments: tuple[Tensor | Workspace | Expr | float, ...], message: str
) -> None:
    one = integer(1)
    with pytest.raises(UserError, match=message):
        write_program(LaunchProgram((), (), one, (Launch(COPY, (one, one, one), arguments),)), lambda variant: "copy")


def test_the_documented_program_is_one() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    lines = text.split("## Programs as text\n```\n")[1].split("\n```")[0].splitlines()
    pointers = tuple((name, "*bf16") for name in ("q", "kv", "sums", "out"))
    variant = Variant("example", (), (*pointers, ("k", "i32"), ("s", "i64"), ("scale", "fp32")), frozenset(), 4, 1)
    program = read_program(lines, {"example": variant})
    (loop,) = program.steps
    assert isinstance(loop, Repeat)
    assert loop.launches[0].arguments[1] == Tensor(1, dim(0, 1) * 2)
    assert write_program(program, lambda variant: variant.kernel)[0] == lines[0]
