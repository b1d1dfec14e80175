"""Launches that select the k best of rows of scores, in one of two forms with the same result.

"prefill": one program a row. "decode": few rows, several programs each, in three launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .parts import Arena, Argument, launch
from .program import Expr, Launch, LaunchProgram, Tensor, Workspace, ceil_div, dim, integer, maximum, minimum
from .tuning import blocks


@dataclass(frozen=True)
class Rows:
    """A tile of queries and their scores: float32 [batch,rows,4 quads] at `scores`, of which the first `count` rows of each
    sequence belong to the queries from `first` on. begin, end: [batch,tokens] of type `bounds`; out: [batch,tokens,width]."""

    scores: Tensor | Workspace
    begin: Tensor
    end: Tensor
    out: Tensor
    bounds: str
    batch: Expr
    tokens: Expr
    slots: Expr
    width: Expr
    rows: Expr
    first: Expr
    count: Expr

    @property
    def quads(self) -> Expr:
        return quads(self.slots)

    def ranges(self) -> tuple[Argument, ...]:
        return ("key_begin", f"*{self.bounds}", self.begin), ("key_end", f"*{self.bounds}", self.end)

    def sizes(self) -> tuple[Argument, ...]:
        return (
            ("first_token", "i32", self.first),
            ("tokens", "i32", self.tokens),
            ("S", "i32", self.slots),
            ("rows", "i32", self.rows),
            ("quads", "i32", self.quads),
            ("width", "i32", self.width),
        )


def quads(slots: Expr) -> Expr:
    """A row of scores is padded to groups of four, which are loaded at once."""
    return ceil_div(slots, 4)


def scratch_per_row(form: str, topk: int, slots: Expr, sm: int) -> Expr:
    """Numbers of four bytes that the launches need beside each row of scores."""
    if form == "prefill":
        return 8 * _capacity(topk, slots, sm)
    use = blocks("topk_compact", sm)
    return 8 * quads(slots) + 256 * minimum(use["SLICES"], ceil_div(slots, use["BLOCK"])) + 2


def topk_launches(form: str, rows: Rows, topk: int, memory: Arena, sm: int) -> tuple[Launch, ...]:
    return (_row_launches if form == "prefill" else _split_launches)(rows, topk, memory, sm)


def _capacity(topk: int, slots: Expr, sm: int) -> Expr:
    """Groups of four keys that may be sent to scratch: all winners, and as many candidates."""
    return minimum(quads(slots), -(-(topk + max(topk, blocks("topk_row", sm)["SPARE"])) // 4))


def _row_launches(rows: Rows, topk: int, memory: Arena, sm: int) -> tuple[Launch, ...]:
    use = blocks("topk_row", sm)
    capacity = _capacity(topk, rows.slots, sm)
    keys, slots = (memory.take(rows.batch * rows.rows * 4 * capacity) for _ in range(2))
    arguments = (
        ("logits", "*fp32", rows.scores),
        *rows.ranges(),
        ("out", "*i32", rows.out),
        ("keys", "*i32", keys),
        ("slots", "*i32", slots),
        *rows.sizes(),
        ("spare", "i32", use["SPARE"]),
        ("capacity", "i32", capacity),
    )
    constants = {"BLOCK": use["BLOCK"], "FINAL": use["FINAL"], "STAGES": use["num_stages"]}
    return (launch("topk_row", (rows.count, rows.batch), arguments, constants, use),)


def _split_launches(rows: Rows, topk: int, memory: Arena, sm: int) -> tuple[Launch, ...]:
    count, compact, finish = (blocks(f"topk_{name}", sm) for name in ("histogram", "compact", "finish"))
    most = minimum(compact["SLICES"], maximum(1, integer(compact["PROGRAMS"]) // maximum(1, rows.batch * rows.rows)))
    slices = minimum(most, maximum(1, ceil_div(rows.slots, compact["BLOCK"])))
    every = rows.batch * rows.rows
    counts, found = memory.take(every * slices * 256), memory.take(every * 2)
    keys, slots = (memory.take(every * 4 * rows.quads) for _ in range(2))
    scores: Argument = ("logits", "*fp32", rows.scores)
    table: Argument = ("counts", "*i32", counts)
    entries: tuple[Argument, ...] = (("keys", "*i32", keys), ("slots", "*i32", slots), ("found", "*i32", found))
    streaming = {"BLOCK": compact["BLOCK"], "STAGES": compact["num_stages"]}
    grid = (slices, rows.count, rows.batch)
    return (
        launch("topk_histogram", grid, (scores, *rows.ranges(), table, *rows.sizes()), streaming, count),
        launch(
            "topk_compact",
            grid,
            (scores, *rows.ranges(), table, *entries, *rows.sizes()),
            {"SLICES": compact["SLICES"], **streaming},
            compact,
        ),
        launch(
            "topk_finish",
            (rows.count, rows.batch),
            (*rows.ranges(), *entries, ("out", "*i32", rows.out), *rows.sizes()),
            {"FINAL": finish["FINAL"]},
            finish,
        ),
    )


@lru_cache(maxsize=64)
def topk_program(topk: int, sm: int, form: str, bounds: str = "i64") -> LaunchProgram:
    """The selection alone. Inputs scores [B,T,S] float32, S a multiple of 4, key_begin and key_end [B,T]; output int32
    [B,T,min(topk,S)]: the best scores of each range, slots ascending, ties to the lowest slot, then -1."""
    batch, tokens, slots = dim(0, 0), dim(0, 1), dim(0, 2)
    width = minimum(topk, slots)
    tile = Rows(
        Tensor(0), Tensor(1), Tensor(2), Tensor(3), bounds, batch, tokens, slots, width, tokens, integer(0), tokens
    )
    memory = Arena()
    steps = topk_launches(form, tile, topk, memory, sm)
    return LaunchProgram(("fp32", bounds, bounds), (("i32", (batch, tokens, width)),), memory.size, steps)
