"""Programs of the lightning indexer: scores of a tile of queries, then the top-k of each, tile after tile.

The scores of all queries would be T x S numbers; a tile is as many queries as fit the budget together with the scratch
of their top-k. Three forms give the same slots, the caller chooses: "prefill" for many queries a sequence, "decode" for
few queries, "batch" for few queries in each of many sequences (scores as in "decode", top-k as in "prefill").
"""

from __future__ import annotations

from dataclasses import dataclass

from .parts import Arena, Argument, launch, power_of_two
from .program import Expr, Launch, LaunchProgram, Repeat, Tensor, ceil_div, dim, integer, maximum, minimum, variable
from .topk_program import Rows, quads, scratch_per_row, topk_launches
from .tuning import blocks

BUDGET_MB = 512
_PADDING = 2048  # bytes that rounding up the parts of the workspace adds at most
FORMS = ("prefill", "decode", "batch")
DECODE_COLUMNS = 512  # query heads of a sequence up to which reading the keys decides how long it takes
_SCORES = {"prefill": "prefill", "decode": "decode", "batch": "decode"}
_TOPK = {"prefill": "prefill", "decode": "decode", "batch": "prefill"}


def indexer_guards(heads: int) -> dict[str, Expr]:
    """Which form to choose: the first whose guard is above 0, over the dims of q and `units`, the GPU's multiprocessors."""
    few = DECODE_COLUMNS + 1 - dim(0, 1) * heads
    return {"decode": minimum(few, variable("units") - dim(0, 0) * dim(0, 1)), "batch": few, "prefill": integer(1)}


@dataclass(frozen=True)
class IndexerCase:
    """Inputs q [B,T,heads,width], k [B,S,width], if `scaled` k_scale [B,S] float32, weights [B,T,heads], key_begin and
    key_end [B,T]; output the slots, int32 [B,T,min(topk,S)].

    dtype ("bf16", "fp16", "fp32", "fp8e4nv"), weights, bounds ("i32", "i64"): element types, by Triton's names.
    sm: GPU architecture, 0 for the interpreter. form: one of FORMS. budget_mb: of workspace; exceeded only if one query a sequence does.
    """

    dtype: str
    heads: int
    width: int
    topk: int
    sm: int
    form: str
    scaled: bool = False
    weights: str = "fp32"
    bounds: str = "i64"
    budget_mb: int = BUDGET_MB

    def program(self) -> LaunchProgram:
        """Raises NoBlocks if the tuning table has no block sizes for it."""
        inputs = (self.dtype, self.dtype, *(("fp32",) if self.scaled else ()), self.weights, self.bounds, self.bounds)
        batch, tokens, slots = dim(0, 0), dim(0, 1), dim(1, 1)
        select = _TOPK[self.form]
        score = _Scores(self.dtype, self.heads, self.width, self.sm, _SCORES[self.form], self.scaled, self.weights)
        per_row = 4 * quads(slots) + scratch_per_row(select, self.topk, slots, self.sm)
        budget = integer(self.budget_mb * 2**18)
        fits = budget // maximum(1, batch * per_row)
        whole = maximum(fits // score.step * score.step, minimum(fits, score.step))  # whole blocks of queries, if any
        rows = minimum(tokens, maximum(1, whole))
        memory = Arena()
        first = variable("t")
        tile = Rows(
            scores=memory.take(batch * rows * 4 * quads(slots)),
            begin=Tensor(len(inputs) - 2),
            end=Tensor(len(inputs) - 1),
            out=Tensor(len(inputs)),
            bounds=self.bounds,
            batch=batch,
            tokens=tokens,
            slots=slots,
            width=minimum(self.topk, slots),
            rows=rows,
            first=first,
            count=minimum(rows, tokens - first),
        )
        launches = (score.launch(tile), *topk_launches(select, tile, self.topk, memory, self.sm))
        outputs = (("i32", (batch, tokens, tile.width)),)
        reserve = 4 * maximum(batch * per_row, minimum(budget, batch * tokens * per_row)) + _PADDING
        return LaunchProgram(inputs, outputs, memory.size, (Repeat("t", tokens, rows, launches),), reserve)


def scores_program(
    dtype: str,
    heads: int,
    width: int,
    sm: int,
    form: str,
    scaled: bool = False,
    weights: str = "fp32",
    bounds: str = "i64",
) -> LaunchProgram:
    """The scores alone, for tests and benchmarks. Inputs as `IndexerCase`; output [B,T,S rounded up to 4]
    float32, of which only what lies in a query's range is written."""
    inputs = (dtype, dtype, *(("fp32",) if scaled else ()), weights, bounds, bounds)
    batch, tokens, slots = dim(0, 0), dim(0, 1), dim(1, 1)
    begin, end, out = (Tensor(len(inputs) + i) for i in (-2, -1, 0))
    tile = Rows(out, begin, end, out, bounds, batch, tokens, slots, slots, tokens, integer(0), tokens)
    step = _Scores(dtype, heads, width, sm, form, scaled, weights).launch(tile)
    return LaunchProgram(inputs, (("fp32", (batch, tokens, 4 * quads(slots))),), integer(0), (step,))


class _Scores:
    """The launch that computes the scores of a tile."""

    def __init__(self, dtype: str, heads: int, width: int, sm: int, form: str, scaled: bool, weights: str) -> None:
        self._kernel = f"indexer_{form}"
        self._use = blocks(self._kernel, sm, dtype, heads, width)
        self._types = dtype, weights
        self._scaled = scaled
        padded = power_of_two(heads)
        columns = max(1, self._use["COLUMNS"] // padded)
        self._queries = max(columns, 16 // padded)  # a tensor core wants 16 columns
        if form == "prefill":
            self._queries = min(self._queries, self._use["BLOCK_T"])
        self.step = self._use["BLOCK_T"] if form == "prefill" else self._queries
        self._constants = {
            "HEADS": heads,
            "HEADS_P": padded,
            "DIM": width,
            "DIM_P": power_of_two(width, 32),
            "BLOCK_S": self._use["BLOCK_S"],
            "STAGES": self._use["num_stages"],
        }

    def launch(self, tile: Rows) -> Launch:
        prefill = self._kernel == "indexer_prefill"
        sizes = (*tile.sizes()[:1], ("count", "i32", tile.count), *tile.sizes()[1:-1])
        key_blocks = ceil_div(tile.slots, self._use["BLOCK_S"])
        query_blocks = ceil_div(tile.count, self.step)
        if prefill:
            grid = (key_blocks, query_blocks, tile.batch)
            constants = self._constants | {"BLOCK_T": self._use["BLOCK_T"], "STEP_T": self._queries}
        else:
            each = _blocks_per_program(key_blocks, query_blocks * tile.batch, self._use["PROGRAMS"])
            sizes += (("blocks", "i32", each),)
            grid = (ceil_div(key_blocks, each), query_blocks, tile.batch)
            constants = self._constants | {"QUERIES": self._queries}
        missing = {} if self._scaled else {"k_scale": None}
        return launch(self._kernel, grid, (*self._tensors(tile), *sizes), {**missing, **constants}, self._use)

    def _tensors(self, tile: Rows) -> tuple[Argument, ...]:
        dtype, weights = self._types
        scale: tuple[Argument, ...] = (("k_scale", "*fp32", Tensor(2)),) if self._scaled else ()
        return (
            ("q", f"*{dtype}", Tensor(0)),
            ("k", f"*{dtype}", Tensor(1)),
            *scale,
            ("weights", f"*{weights}", Tensor(2 + len(scale))),
            *tile.ranges(),
            ("logits", "*fp32", tile.scores),
        )


def _blocks_per_program(key_blocks: Expr, others: Expr, programs: int) -> Expr:
    """So that about `programs` programs run at once."""
    return maximum(1, ceil_div(key_blocks, maximum(1, integer(programs) // maximum(1, others))))
