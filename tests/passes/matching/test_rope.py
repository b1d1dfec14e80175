"""read_k_pe: whatever rotation a graph computes, its pairs, columns and rows are read off; what is no rotation is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import inputs_of, node_of, nodes_of, op_name, outputs_of, program_of
from torch import Tensor
from torch.export import ExportedProgram

from mla2dsa.passes.graph.graph_eval import ancestors, value
from mla2dsa.passes.matching.rope import find_tables, head_axis, read_k_pe
from mla2dsa.passes.matching.sites import NoMatch, Rope

BATCH, TOKENS, LATENT = 2, 7, 6
Lines = Callable[[Tensor, Tensor], Tensor]  # projection [B, T, W], angles [B, T, F] -> k_pe


def exported(lines: Lines, width: int, columns: int) -> ExportedProgram:
    return program_of(lines, torch.zeros(BATCH, TOKENS, width), torch.zeros(BATCH, TOKENS, columns))


def read(lines: Lines, width: int, columns: int) -> tuple[Rope | None, tuple[int, ...]]:
    program = exported(lines, width, columns)
    return read_k_pe(outputs_of(program)[0], inputs_of(program)[0])


# Any rotation


@dataclass(frozen=True)
class Rotation:
    """Channels `pairs[i]` are turned by column `table[i]`; `rows` of the projection become the channels."""

    pairs: tuple[tuple[int, int], ...]
    table: tuple[int, ...]
    rows: tuple[int, ...]
    cast: bool = False
    heads: bool = False

    def __call__(self, projection: Tensor, angles: Tensor) -> Tensor:
        channels = [projection[..., row] for row in self.rows]
        cos, sin = angles.cos(), angles.sin()
        if self.cast:
            cos, sin = cos.to(projection.dtype), sin.to(projection.dtype)
        out = [*channels]
        for (a, b), column in zip(self.pairs, self.table, strict=True):
            c, s = cos[..., column], sin[..., column]
            out[a] = channels[a] * c - channels[b] * s
            out[b] = channels[b] * c + channels[a] * s
        turned = torch.stack(out, -1)
        return turned.unsqueeze(1) if self.heads else turned


@st.composite
def rotations(draw: st.DrawFn) -> Rotation:
    count = draw(st.integers(1, 4))
    order = draw(st.permutations(range(2 * count)))
    columns = draw(st.permutations(range(count + draw(st.integers(0, 2)))))[:count]
    rows = draw(st.permutations(range(LATENT + 2 * count)))[: 2 * count]
    pairs = tuple(zip(order[::2], order[1::2], strict=True))
    return Rotation(pairs, tuple(columns), tuple(rows), draw(st.booleans()), draw(st.booleans()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rotation=rotations(), spare=st.integers(0, 2))
def test_any_rotation_is_read_off(rotation: Rotation, spare: int) -> None:
    width, columns = LATENT + 2 * len(rotation.pairs), max(rotation.table) + 1 + spare
    rope, rows = read(rotation, width, columns)
    by_column = sorted(zip(rotation.table, rotation.pairs, strict=True))
    assert rope is not None
    assert (rope.table, rope.pairs) == (tuple(c for c, _ in by_column), tuple(pair for _, pair in by_column))
    assert (rows, rope.complex_table) == (rotation.rows, False)
    assert (op_name(rope.cos), op_name(rope.sin)) == (("to", "to") if op_name(rope.cos) == "to" else ("cos", "sin"))


def split(projection: Tensor) -> Tensor:
    """k_pe before rotation: the last 4 of 10 rows."""
    return projection[..., LATENT:]


def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def regrouped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' DeepSeek-V3: pairs are brought together first, then turned as halves."""
    x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return half_split(x, cos, sin)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


STYLES = {
    "half-split": (half_split, ((0, 2), (1, 3)), (6, 7, 8, 9)),
    "interleaved": (interleaved, ((0, 1), (2, 3)), (6, 7, 8, 9)),
    "regrouped": (regrouped, ((0, 2), (1, 3)), (6, 8, 7, 9)),
    "rotate_half": (rotate_half, ((0, 2), (1, 3)), (6, 7, 8, 9)),
}


@pytest.mark.parametrize("name", STYLES)
def test_the_known_styles(name: str) -> None:
    turn, pairs, rows = STYLES[name]
    rope, got = read(lambda p, angles: turn(split(p), angles.cos(), angles.sin()), LATENT + 4, 2)
    assert rope is not None
    assert (rope.pairs, rope.table, got) == (pairs, (0, 1), rows)


def by_polar(p: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(split(p).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def by_cast_polar(p: Tensor, angles: Tensor) -> Tensor:
    """As transformers' DeepSeek-V2 does it: in single precision, whatever the model's type is."""
    pairs = torch.view_as_complex(split(p).float().unflatten(-1, (-1, 2)).contiguous())
    table = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    return torch.view_as_real(pairs.to(torch.complex64) * table).flatten(-2).type_as(p)


@pytest.mark.parametrize("lines", [by_polar, by_cast_polar], ids=lambda f: f.__name__)
def test_a_complex_table_is_one_node(lines: Lines) -> None:
    program = exported(lines, LATENT + 4, 2)
    rope, rows = read_k_pe(outputs_of(program)[0], inputs_of(program)[0])
    assert rope is not None
    assert (rope.cos, rope.complex_table) == (rope.sin, True)
    assert value(rope.cos).is_complex()
    assert node_of(program, "polar") in ancestors(rope.cos)
    assert (rope.pairs, rope.table, rows) == (((0, 1), (2, 3)), (0, 1), (6, 7, 8, 9))


def test_a_key_without_a_table_is_not_rotated() -> None:
    assert read(lambda p, angles: split(p).flip(-1), LATENT + 4, 2) == (None, (9, 8, 7, 6))
    assert read(lambda p, angles: split(p), LATENT + 4, 2) == (None, (6, 7, 8, 9))


def test_the_factor_of_yarn_belongs_to_the_table() -> None:
    """transformers multiplies cos and sin with the attention factor, and casts them, before anybody uses them."""

    def lines(p: Tensor, angles: Tensor) -> Tensor:
        cos, sin = ((t * 1.3).to(torch.float16).to(p.dtype) for t in (angles.cos(), angles.sin()))
        return half_split(split(p), cos, sin)

    program = exported(lines, LATENT + 4, 2)
    rope, _ = read_k_pe(outputs_of(program)[0], inputs_of(program)[0])
    assert rope is not None
    casts = nodes_of(program, "to")
    assert rope.cos in casts
    assert rope.sin in casts
    assert not [user for user in rope.cos.users if op_name(user) in ("to", "mul") and user in casts]


def test_a_table_with_two_readers_is_taken_before_them() -> None:
    """One of them is cast, the other is not: there is no one later node that stands for the table."""

    def lines(p: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos(), angles.sin()
        a, b = split(p).chunk(2, -1)
        return torch.cat([a * cos.double() - b * sin, b * cos + a * sin], -1)

    program = exported(lines, LATENT + 4, 2)
    rope, _ = read_k_pe(outputs_of(program)[0], inputs_of(program)[0])
    assert rope is not None
    assert rope.cos is node_of(program, "cos")


@pytest.mark.parametrize(
    ("reshaped", "axis"),
    [(lambda t: t, 0), (lambda t: t[:, None], 1), (lambda t: t[:, :, None], 2)],
    ids=["no heads", "heads first", "heads last"],
)
def test_the_head_axis_of_a_table(reshaped: Callable[[Tensor], Tensor], axis: int) -> None:
    program = program_of(lambda angles: reshaped(angles).cos(), torch.zeros(BATCH, TOKENS, 2))
    assert head_axis(outputs_of(program)[0]) == axis


@pytest.mark.parametrize(
    "reshaped",
    [lambda t: t[0], lambda t: t.expand(3, *t.shape), lambda t: t[None, None], lambda t: t[:, :1]],
    ids=["two axes", "three heads", "five axes", "one token"],
)
def test_other_tables_have_none(reshaped: Callable[[Tensor], Tensor]) -> None:
    program = program_of(lambda angles: reshaped(angles).cos(), torch.zeros(BATCH, TOKENS, 2))
    assert head_axis(outputs_of(program)[0]) is None


# What is no rotation


def with_tables(turn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Lines:
    return lambda p, angles: turn(split(p), angles.cos(), angles.sin())


def mixed(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.cat([a * c - b * d, b * c + a * d], -1)


SELECTION = r"^k_pe is not a selection of the projection's rows \(a norm or a factor stands between\)$"
PAIRS = "^k_pe's rotation does not pair its channels$"
REFUSED: dict[str, tuple[Lines, str]] = {
    "factor": (lambda p, angles: 2 * half_split(split(p), angles.cos(), angles.sin()), SELECTION),
    "fraction": (lambda p, angles: half_split(split(p) * 1.01, angles.cos(), angles.sin()), SELECTION),
    "sum of rows": (with_tables(lambda x, c, s: half_split(x + x.sum(-1, keepdim=True), c, s)), SELECTION),
    "row twice": (with_tables(lambda x, c, s: half_split(torch.cat([x[..., :3], x[..., :1]], -1), c, s)), SELECTION),
    "norm": (with_tables(lambda x, c, s: half_split(x / x.norm(dim=-1, keepdim=True), c, s)), SELECTION),
    "constant": (with_tables(lambda x, c, s: half_split(x, c, s) + 1), SELECTION),
    "cosine alone": (lambda p, angles: split(p) * torch.cat([angles.cos()] * 2, -1), "^k_pe is rotated by cos, expected a"),
    "sine alone": (lambda p, angles: split(p) * torch.cat([angles.sin()] * 2, -1), "^k_pe is rotated by sin, expected"),
    "complex and real": (
        lambda p, angles: torch.polar(angles, angles).real.sum() * half_split(split(p), angles.cos(), angles.sin()),
        "^k_pe is rotated by cos and polar and sin, expected a cosine and a sine$",
    ),
    "in part": (
        with_tables(lambda x, c, s: torch.cat([half_split(x[..., :2], c[..., :1], s[..., :1]), x[..., 2:]], -1)), PAIRS,
    ),
    "mirrored": (with_tables(lambda x, c, s: mixed(*x.chunk(2, -1), c, s).abs()), PAIRS),
    "both with plus": (
        with_tables(lambda x, c, s: torch.cat([x[..., :2] * c + x[..., 2:] * s, x[..., 2:] * c + x[..., :2] * s], -1)), PAIRS,
    ),
    "not in pairs": (
        with_tables(lambda x, c, s: x * torch.cat([c, c], -1) + x.roll(1, -1) * torch.cat([s, s], -1)), PAIRS,
    ),
    "other columns for sin": (
        with_tables(lambda x, c, s: half_split(x, c, s.flip(-1))),
        "^k_pe's rotation uses different columns of cos and sin$",
    ),
    "sine with a factor": (
        with_tables(lambda x, c, s: mixed(*x.chunk(2, -1), c, (s + s) * 0.505)), "^k_pe's rotation",
    ),
    "squared table": (
        with_tables(lambda x, c, s: half_split(x, c.square(), s.square())),
        "^k_pe's channels are not each turned by one column of the table$",
    ),
    "squared column": (
        with_tables(lambda x, c, s: half_split(x[..., ::2], c[..., :1].square(), s[..., :1].square())), "^k_pe is not",
    ),
    "rotated twice": (
        with_tables(lambda x, c, s: half_split(half_split(x, c, s), c, s)), PAIRS,
    ),
    "a product of both tables": (
        with_tables(lambda x, c, s: half_split(x, c, s) + x * torch.cat([c * s, c * s], -1)),
        "^k_pe is not its projection's rows rotated$",
    ),
    "two tables": (
        lambda p, angles: half_split(split(p), angles.cos(), angles.sin()) * (angles * 2).cos().sum(),
        "^k_pe is rotated by two tables$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_rotation_is_refused(name: str) -> None:
    lines, reason = REFUSED[name]
    program = exported(lines, LATENT + 4, 2)
    with pytest.raises(NoMatch, match=reason) as miss:
        read_k_pe(outputs_of(program)[0], inputs_of(program)[0])
    assert miss.value.node is not None
    assert miss.value.node in program.graph.nodes


def test_a_table_without_batch_and_tokens_is_blamed_itself() -> None:
    program = exported(lambda p, angles: half_split(split(p), angles[0].cos(), angles[0].sin()), LATENT + 4, 2)
    with pytest.raises(NoMatch, match=r"^the rotary table is \[s\d+, 2\], not \[batch, tokens, frequencies\]$") as miss:
        read_k_pe(outputs_of(program)[0], inputs_of(program)[0])
    assert miss.value.node is node_of(program, "cos")


def test_a_way_that_reads_something_else_is_refused() -> None:
    program = program_of(
        lambda p, angles, x: half_split(split(p) + 0 * x, angles.cos(), angles.sin()),
        torch.zeros(2, 7, 10), torch.zeros(2, 7, 2), torch.zeros(2, 7, 4),
    )  # fmt: skip
    reason = r"^the way from the projection to k_pe cannot be read \(args_2 has no value here\)$"
    with pytest.raises(NoMatch, match=reason) as miss:
        read_k_pe(outputs_of(program)[0], inputs_of(program)[0])
    assert miss.value.node is outputs_of(program)[0]


def test_tables_behind_a_projection_are_another_matter() -> None:
    """The hidden state may have been rotated; k_pe is rotated by what comes after its projection."""

    class Projected(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kv_a = torch.nn.Linear(4, 10, bias=False)

        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            return split(self.kv_a(half_split(x, (2 * angles).cos(), (2 * angles).sin())))

    program = program_of(Projected(), torch.zeros(2, 7, 4), torch.zeros(2, 7, 2))
    assert find_tables(outputs_of(program)[0]) == {}
    assert read_k_pe(outputs_of(program)[0], node_of(program, "linear")) == (None, (6, 7, 8, 9))
