"""Read off a rotary embedding by rotating tags: which channels turn together, by which column of the table.

    kv_a -> movement -> x * cos + rotated(x) * sin -> k_pe

With cos = 1 and sin = 0 the output names the row each channel comes from; with cos = 0 and sin = 1 each channel becomes
plus or minus its partner; with cos = 1, 2, 3, ... and x = 1 it names its column. No spelling of the rotation is assumed,
and what was read off is checked once on random numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ...compat import torch_private
from ..graph.graph_eval import (
    CASTS,
    CannotEvaluate,
    ancestors,
    concrete_shape,
    evaluate,
    linear_parts,
    node_symbols,
    shape,
    symbols,
    value,
)
from .sites import NoMatch, Rope

aten = torch.ops.aten

_TABLES: dict[object, str] = {aten.cos.default: "cos", aten.sin.default: "sin", aten.polar.default: "polar"}


def read_k_pe(k_pe: Node, kv_a: Node) -> tuple[Rope | None, tuple[int, ...]]:
    """(rope, rows of kv_a behind k_pe's channels). rope is None for an unrotated (NoPE) key. Raises NoMatch."""
    tables = find_tables(k_pe)
    if tables.keys() not in (set(), {"polar"}, {"cos", "sin"}):
        raise NoMatch(f"k_pe is rotated by {' and '.join(sorted(tables))}, expected a cosine and a sine", k_pe)
    probe = _RotationProbe(k_pe, kv_a, tables)
    rows = probe.rows()
    if not tables:
        return None, rows
    partners, first = probe.partners(rows)
    columns = probe.columns()
    probe.check(rows, partners, first, columns)
    pairs = sorted((columns[a], a, partners[a]) for a in range(len(rows)) if first[a])
    cos, sin = (tables[kind] if kind in tables else tables["polar"] for kind in ("cos", "sin"))
    if head_axis(cos) is None:
        raise NoMatch(f"the rotary table is {list(shape(cos))}, not [batch, tokens, frequencies]", cos)
    return Rope(cos, sin, "polar" in tables, tuple((a, b) for _, a, b in pairs), tuple(c for c, _, _ in pairs)), rows


def find_tables(node: Node) -> dict[str, Node]:
    """The rotary table nodes that reach `node` without a projection between: {"cos", "sin"}, {"polar"}, or {}."""
    tables: dict[str, Node] = {}
    for source in ancestors(node, stop=lambda n: linear_parts(n) is not None or n.target in _TABLES):
        kind = _TABLES.get(source.target)
        if kind is not None:
            if kind in tables:
                raise NoMatch("k_pe is rotated by two tables", source)
            tables[kind] = _after_scaling(source)
    return tables


def head_axis(table: Node) -> int | None:
    """Where a table has an axis of one for the heads: 1 or 2 of four; 0 when it has none; None when it is unreadable."""
    sizes = shape(table)
    if len(sizes) == 3:
        return 0 if symbols(sizes[1]) else None
    axes = [axis for axis in (1, 2) if len(sizes) == 4 and sizes[axis] == 1 and symbols(sizes[3 - axis])]
    return axes[0] if axes else None


def _after_scaling(table: Node) -> Node:
    """Past the casts and constant factors (YaRN's attention factor) that some models put on the table."""
    while True:
        after = [u for u in table.users if u.target in CASTS or _times_number(u)]
        if len(after) != 1 or len([u for u in table.users if not torch_private.is_metadata_assert(u.target)]) != 1:
            return table
        table = after[0]


def _times_number(node: Node) -> bool:
    return node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(node.args[1], int | float)


class _RotationProbe:
    """Runs the piece of graph between kv_a and k_pe on one token."""

    def __init__(self, k_pe: Node, kv_a: Node, tables: dict[str, Node]) -> None:
        self.k_pe, self.kv_a, self.tables = k_pe, kv_a, tables
        cone = ancestors(k_pe, stop=lambda n: n is kv_a or n in tables.values())
        self.env = dict.fromkeys(node_symbols(cone), 1)

    def _run(self, source: Tensor, cos: Tensor | float, sin: Tensor | float) -> Tensor:
        feed: dict[Node, Tensor] = {self.kv_a: source.view(concrete_shape(self.kv_a, self.env))}
        for kind, node in self.tables.items():
            blank = torch.zeros(concrete_shape(node, self.env), dtype=torch.float64)
            if kind == "polar":
                feed[node] = torch.complex(blank + cos, blank + sin)
            else:
                feed[node] = blank + (cos if kind == "cos" else sin)
        try:
            out: Tensor = evaluate([self.k_pe], feed, self.env)[0]
        except (CannotEvaluate, RuntimeError) as error:
            raise NoMatch(
                f"the way from the projection to k_pe cannot be read ({str(error).splitlines()[0]})", self.k_pe
            ) from error
        return out.flatten()

    def _tags(self) -> Tensor:
        width = int(shape(self.kv_a)[-1])
        return torch.arange(1, width + 1, dtype=torch.float64)

    def rows(self) -> tuple[int, ...]:
        got = self._run(self._tags(), 1.0, 0.0)
        width = int(shape(self.kv_a)[-1])
        rows = [round(v) - 1 for v in got.tolist()]
        exact = torch.equal(got, got.round()) and all(0 <= row < width for row in rows) and len(set(rows)) == len(rows)
        if not exact:
            raise NoMatch(
                "k_pe is not a selection of the projection's rows (a norm or a factor stands between)", self.k_pe
            )
        return tuple(rows)

    def partners(self, rows: tuple[int, ...]) -> tuple[list[int], list[bool]]:
        """Per channel the one it is rotated with, and whether it is the first of the pair (gets minus the other)."""
        got = self._run(self._tags(), 0.0, 1.0).tolist()
        channel = {row + 1: i for i, row in enumerate(rows)}
        try:
            partners = [channel[round(abs(v))] for v in got]
        except KeyError:
            raise NoMatch("k_pe's rotation does not pair its channels", self.k_pe) from None
        first = [v < 0 for v in got]
        if any(partners[partners[i]] != i or first[i] == first[partners[i]] for i in range(len(rows))):
            raise NoMatch("k_pe's rotation does not pair its channels", self.k_pe)
        return partners, first

    def columns(self) -> list[int]:
        """Per channel the column of the table it is turned by, the same for cos and sin."""
        table = next(iter(self.tables.values()))
        width = int(value(table).shape[-1])
        numbers = torch.arange(1, width + 1, dtype=torch.float64)
        ones = torch.ones_like(self._tags())
        by_cos, by_sin = self._run(ones, numbers, 0.0), self._run(ones, 0.0, numbers).abs()
        if not torch.equal(by_cos, by_sin):
            raise NoMatch("k_pe's rotation uses different columns of cos and sin", self.k_pe)
        if not bool(torch.isin(by_cos, numbers).all()):
            raise NoMatch("k_pe's channels are not each turned by one column of the table", self.k_pe)
        return [round(v) - 1 for v in by_cos.tolist()]

    def check(self, rows: tuple[int, ...], partners: list[int], first: list[bool], columns: list[int]) -> None:
        """What was read off from tags is what the graph computes of any numbers. Raises NoMatch."""
        generator = torch.Generator().manual_seed(0)
        source, cos, sin = (torch.randn(n, generator=generator, dtype=torch.float64) for n in self._widths())
        x = source[list(rows)]
        turned = torch.where(torch.tensor(first), -1.0, 1.0) * x[partners] * sin[columns]
        if not torch.allclose(self._run(source, cos, sin), x * cos[columns] + turned, rtol=1e-9, atol=1e-9):
            raise NoMatch("k_pe is not its projection's rows rotated", self.k_pe)

    def _widths(self) -> tuple[int, int, int]:
        """Channels of the projection, columns of either table."""
        columns = int(value(next(iter(self.tables.values()))).shape[-1])
        return int(shape(self.kv_a)[-1]), columns, columns
