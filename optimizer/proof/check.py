"""Numeric check of a pass: run the graph before and after, and name the first layer that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...runtime.execute import Loader, PieceRunner
from ...runtime.logits import Logits
from .figures import blocks


@dataclass(frozen=True)
class Difference:
    """Largest relative difference of one layer (or the outputs) over all inputs: max |a - b| / max |a|.

    nans, infinities: how many values are so, in the graph before and in the one after; with any, `relative` is NaN, which is
    within no tolerance.
    """

    name: str
    relative: float
    nans: tuple[int, int] = (0, 0)
    infinities: tuple[int, int] = (0, 0)

    def joined(self, other: Difference) -> Difference:
        """Of both: the larger difference, all that is not finite."""
        nans, infinities = (
            (mine[0] + theirs[0], mine[1] + theirs[1])
            for mine, theirs in ((self.nans, other.nans), (self.infinities, other.infinities))
        )
        return Difference(self.name, _larger(self.relative, other.relative), nans, infinities)

    def __str__(self) -> str:
        counts = zip(("NaN", "infinite"), (self.nans, self.infinities), strict=True)
        strange = [f"{a} {what} values before and {b} after" for what, (a, b) in counts if a or b]
        return f"{self.name} ({', '.join(strange)})" if strange else self.name


@dataclass(frozen=True)
class NumericCheck:
    """Per layer in graph order, then "outputs". `first_bad` is the first one above the tolerance."""

    differences: tuple[Difference, ...]
    tolerance: float

    @property
    def first_bad(self) -> Difference | None:
        return next((d for d in self.differences if not d.relative <= self.tolerance), None)

    @property
    def worst(self) -> float:
        """The largest difference; NaN if there is one."""
        return reduce(_larger, (d.relative for d in self.differences))


def compare(
    before: ExportedProgram,
    after: ExportedProgram,
    sequences: Sequence[Mapping[str, Tensor]],
    layers: Sequence[tuple[str, str, str]],
    tolerance: float,
    load_before: Loader | None = None,
    load_after: Loader | None = None,
) -> NumericCheck:
    """Run both programs on `sequences` and compare the nodes of `layers` (name, node before, node after), then the outputs.

    Layers are streamed, so weights of one layer of each program are in memory. Padded positions (attention_mask == 0) are
    not compared: what a padded query gets is unspecified.
    """
    first = PieceRunner(before, load_before, [old for _, old, _ in layers])
    second = PieceRunner(after, load_after, [new for _, _, new in layers])
    worst = {name: Difference(name, 0.0) for name, _, _ in layers}
    run_first = first.run(sequences, [old for _, old, _ in layers] + first.outputs)
    run_second = second.run(sequences, [new for _, _, new in layers] + second.outputs)
    outputs = Difference("outputs", 0.0)
    for a, b in zip(run_first, run_second, strict=True):
        mask = sequences[a.sequence].get("attention_mask")
        for name, old, new in layers:
            if old in a.values and new in b.values:
                found = difference(name, a.values[old], b.values[new], mask, token_axis=2)
                worst[name] = worst[name].joined(found)
        for old, new in zip(first.outputs, second.outputs, strict=True):
            if old in a.values and new in b.values:
                outputs = outputs.joined(difference("outputs", a.values[old], b.values[new], mask))
    return NumericCheck((*worst.values(), outputs), tolerance)


def difference(name: str, a: Tensor, b: Tensor, mask: Tensor | None = None, token_axis: int = 1) -> Difference:
    """Of the values at real tokens."""
    if mask is not None and not bool(mask.all()):
        a, b = a.movedim(token_axis, 1)[mask.bool()], b.movedim(token_axis, 1)[mask.bool()]
    nans = (int(a.isnan().sum()), int(b.isnan().sum()))
    infinities = (int(a.isinf().sum()), int(b.isinf().sum()))
    if any((*nans, *infinities)):
        return Difference(name, float("nan"), nans, infinities)
    scale = a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)
    return Difference(name, float((a - b).abs_().max() / scale))


def logits_difference(a: Logits, b: Logits) -> float:
    """The largest difference of one sequence's, relative to the largest of `a`; NaN where something is not finite."""
    worst, largest = torch.zeros(()), torch.tensor(torch.finfo(torch.float32).tiny)
    for positions in blocks(0, a.tokens):
        one, two = (logits.rows(positions).float().cpu() for logits in (a, b))
        worst, largest = torch.maximum(worst, (one - two).abs().max()), torch.maximum(largest, one.abs().max())
    return float(worst / largest)


def _larger(a: float, b: float) -> float:
    """max that keeps NaN."""
    return b if b != b or b > a else a
