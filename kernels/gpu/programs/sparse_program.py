"""Programs of sparse MLA, over key rows of the model's dtype or of 656 bytes (float8), in two forms.

"prefill": a program a query and block of heads. "decode": few queries, so the selection of each is split between
programs, and a second launch combines their sums. The caller chooses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .parts import Arena, Argument, launch, power_of_two
from .program import Expr, Launch, LaunchProgram, Tensor, Workspace, ceil_div, dim, integer, maximum, minimum, variable
from .tuning import blocks

FORMS = ("prefill", "decode")
FP8_RANK, FP8_ROPE = 512, 64  # the only sizes that the 656-byte layout has
_HEAD_BLOCK = 64
_MOST_UNITS = 1024  # more multiprocessors than any GPU has
_PADDING = 1024  # bytes that rounding up the parts of the workspace adds at most
_NATIVE_FP8 = 89  # the first architecture that has the type


def attention_guards(heads: int) -> dict[str, Expr]:
    """Which form to choose: the first whose guard is above 0, over the dims of q and `units`, the GPU's multiprocessors."""
    programs = dim(0, 0) * dim(0, 1) * -(-heads // _HEAD_BLOCK)
    return {"decode": minimum(_MOST_UNITS, variable("units")) - programs, "prefill": integer(1)}


@dataclass(frozen=True)
class AttentionCase:
    """Inputs q [B,T,heads,rank+rope], kv [B,S,rank+rope], indices int32 [B,T,K]; output [B,T,heads,rank] of the same
    dtype ("bf16", "fp16", "fp32"). sm: GPU architecture, 0 for the interpreter. form: one of FORMS."""

    dtype: str
    heads: int
    rank: int
    rope: int
    scale: float
    sm: int
    form: str

    def program(self) -> LaunchProgram:
        """Raises NoBlocks if the tuning table has no block sizes for it."""
        rank, rope = self.rank, self.rope
        sizes = {"RANK": rank, "RANK_P": power_of_two(rank, 16), "ROPE": rope, "ROPE_P": power_of_two(rope, 16)}
        attention = _Attention("sparse_mla", self.dtype, self.dtype, self.heads, rank, rope, self.scale, self.sm, sizes)
        return attention.program(self.form)


@dataclass(frozen=True)
class PackedAttentionCase:
    """Inputs q bf16 [B,T,heads,576], kv u8 [B,S,656], indices int32 [B,T,K]; output bf16 [B,T,heads,512].
    native: whether the GPU has the type e4m3; if None, what its architecture says."""

    heads: int
    scale: float
    sm: int
    form: str
    native: bool | None = None

    def program(self) -> LaunchProgram:
        native = self.sm >= _NATIVE_FP8 if self.native is None else self.native
        constants = {"NATIVE": native}
        attention = _Attention(
            "sparse_mla_fp8", "bf16", "u8", self.heads, FP8_RANK, FP8_ROPE, self.scale, self.sm, constants
        )
        return attention.program(self.form)


@dataclass(frozen=True)
class _Attention:
    kernel: str
    dtype: str
    row: str  # element type of kv
    heads: int
    rank: int
    rope: int
    scale: float
    sm: int
    constants: Mapping[str, int]

    def program(self, form: str) -> LaunchProgram:
        memory = Arena()
        steps = (self._whole(),) if form == "prefill" else self._split(memory)
        outputs = ((self.dtype, (dim(0, 0), dim(0, 1), integer(self.heads), integer(self.rank))),)
        reserve = None if form == "prefill" else self._reserve()
        return LaunchProgram((self.dtype, self.row, "i32"), outputs, memory.size, steps, reserve)

    def _reserve(self) -> Expr:
        """Splits times queries is at most this: few queries have many splits. More queries than the guard lets in do not count."""
        use = self._blocks(f"{self.kernel}_split")
        blocks_of_heads = -(-self.heads // use["BLOCK_H"])
        queries = minimum(dim(0, 0) * dim(0, 1), _MOST_UNITS)
        most = minimum(use["SPLITS"], maximum(1, ceil_div(dim(2, 2), use["BLOCK_K"])))
        parts = minimum(most * queries, maximum(queries, use["PROGRAMS"] // blocks_of_heads))
        return 4 * parts * self.heads * (self.rank + 2) + _PADDING

    def _whole(self) -> Launch:
        use = self._blocks(self.kernel)
        out: Argument = ("out", f"*{self.dtype}", Tensor(3))
        arguments = (*self._tensors(), out, *self._sizes(), self._scale())
        return launch(self.kernel, (self._programs(use),), arguments, self._constants(use), use)

    def _split(self, memory: Arena) -> tuple[Launch, ...]:
        """`each` blocks of the selection a program."""
        use = self._blocks(f"{self.kernel}_split")
        key_blocks = maximum(1, ceil_div(dim(2, 2), use["BLOCK_K"]))
        splits = minimum(use["SPLITS"], maximum(1, integer(use["PROGRAMS"]) // maximum(1, self._programs(use))))
        each = ceil_div(key_blocks, splits)
        splits, queries = ceil_div(key_blocks, each), dim(0, 0) * dim(0, 1)
        parts = _parts(memory, splits * queries * self.heads, self.rank)
        counts: tuple[Argument, ...] = (("queries", "i32", queries), ("blocks", "i32", each))
        attend = launch(
            f"{self.kernel}_split",
            (self._programs(use), splits),
            (*self._tensors(), *parts, *self._sizes(), *counts, self._scale()),
            self._constants(use),
            use,
        )
        return attend, self._combine(parts, queries, splits, use["SPLITS"])

    def _combine(self, parts: tuple[Argument, ...], queries: Expr, splits: Expr, most: int) -> Launch:
        out: Argument = ("out", f"*{self.dtype}", Tensor(3))
        counts: tuple[Argument, ...] = (("queries", "i32", queries), ("splits", "i32", splits))
        constants = {"HEADS": self.heads, "RANK": self.rank, "RANK_P": power_of_two(self.rank, 16), "SPLITS": most}
        use = blocks("combine", self.sm)
        return launch("combine", (queries, self.heads), (*parts, out, *counts), constants, use)

    def _blocks(self, kernel: str) -> dict[str, int]:
        """The tuning row, with no more rows of heads than there are heads: but 16, as a tensor core wants."""
        use = blocks(kernel, self.sm, self.dtype, self.heads, self.rank + self.rope)
        return use | {"BLOCK_H": min(use["BLOCK_H"], power_of_two(self.heads, 16))}

    def _programs(self, use: Mapping[str, int]) -> Expr:
        return dim(0, 0) * dim(0, 1) * -(-self.heads // use["BLOCK_H"])

    def _constants(self, use: Mapping[str, int]) -> dict[str, int]:
        own = {"BLOCK_H": use["BLOCK_H"], "BLOCK_K": use["BLOCK_K"], "STAGES": use["num_stages"]}
        return {"HEADS": self.heads, **self.constants, **own}

    def _tensors(self) -> tuple[Argument, ...]:
        return ("q", f"*{self.dtype}", Tensor(0)), ("kv", f"*{self.row}", Tensor(1)), ("indices", "*i32", Tensor(2))

    def _sizes(self) -> tuple[Argument, ...]:
        return ("tokens", "i32", dim(0, 1)), ("S", "i32", dim(1, 1)), ("selection", "i32", dim(2, 2))

    def _scale(self) -> Argument:
        return "scale", "fp32", self.scale * math.log2(math.e)


def _parts(memory: Arena, rows: Expr, rank: int) -> tuple[Argument, ...]:
    """Sums, maximum and total of each split, query and head."""
    sums: Workspace = memory.take(rows * rank)
    largest, total = memory.take(rows), memory.take(rows)
    return ("part_sums", "*fp32", sums), ("part_largest", "*fp32", largest), ("part_total", "*fp32", total)
