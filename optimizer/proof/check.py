"""Numeric check of a pass: run the graph before and after, and name the first layer that differs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...errors import UserError
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
    run_first = first.run(sequences, [old for _, old, _ in layers] + first.outputs, late=True)
    run_second = second.run(sequences, [new for _, _, new in layers] + second.outputs, late=True)
    outputs = Difference("outputs", 0.0)
    seen: set[str] = set()
    for a, b in zip(run_first, run_second, strict=True):
        mask = sequences[a.sequence].get("attention_mask")
        for name, old, new in layers:
            if old in a.values and new in b.values:
                found = difference(name, a.values[old], b.values[new], mask, token_axis=2)
                worst[name] = worst[name].joined(found)
                seen.add(name)
        for old, new in zip(first.outputs, second.outputs, strict=True):
            if old in a.values and new in b.values:
                outputs = outputs.joined(_of_outputs(a.values[old], b.values[new], mask))
                seen.add(outputs.name)
    if missed := [name for name in (*worst, outputs.name) if name not in seen]:
        raise UserError(
            f"{missed[0]}: the two graphs compute it in different pieces, so that it cannot be compared; please report it"
        )
    return NumericCheck((*worst.values(), outputs), tolerance)


def difference(name: str, a: Tensor, b: Tensor, mask: Tensor | None = None, token_axis: int = 1) -> Difference:
    """Of the values at real tokens."""
    if mask is not None and not bool(mask.all()):
        a, b = a.movedim(token_axis, 1)[mask.bool()], b.movedim(token_axis, 1)[mask.bool()]
    return _difference(name, [(a, b)])


def logits_difference(a: Logits, b: Logits) -> float:
    """The largest difference of one sequence's, relative to the largest of `a`; NaN where something is not finite."""
    return _of_outputs(a, b, None).relative


def _of_outputs(a: Any, b: Any, mask: Tensor | None) -> Difference:
    """Of outputs of two programs, Logits or tensors."""
    if not isinstance(a, Logits) and not isinstance(b, Logits):
        return difference("outputs", a, b, mask)
    a, b = (found if isinstance(found, Logits) else Logits(found) for found in (a, b))

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for number, positions in product(range(a.x.shape[0]), blocks(0, a.tokens)):
            real = slice(None) if mask is None else mask[number, positions].bool().cpu()
            yield a.rows(positions, number).cpu()[real], b.rows(positions, number).cpu()[real]

    return _difference("outputs", rows())


def _difference(name: str, parts: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    """Over all parts of the values."""
    worst, scale = 0.0, 0.0
    nans, infinities = [0, 0], [0, 0]
    for pair in parts:
        nans = [count + int(x.isnan().sum()) for count, x in zip(nans, pair, strict=True)]
        infinities = [count + int(x.isinf().sum()) for count, x in zip(infinities, pair, strict=True)]
        if pair[0].numel():
            scale = max(scale, float(pair[0].abs().max()), float(torch.finfo(pair[0].dtype).tiny))
            worst = max(worst, float((pair[0] - pair[1]).abs_().max()))
    if any((*nans, *infinities)):
        return Difference(name, float("nan"), (nans[0], nans[1]), (infinities[0], infinities[1]))
    return Difference(name, worst / scale if scale else 0.0)


def _larger(a: float, b: float) -> float:
    """max that keeps NaN."""
    return b if b != b or b > a else a
