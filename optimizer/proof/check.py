"""Numeric check of a pass: run the graph before and after, and name the first layer that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...runtime.execute import Loader, PieceRunner


@dataclass(frozen=True)
class Difference:
    """Largest relative difference of one layer (or the outputs) over all inputs: max |a - b| / max |a|."""

    name: str
    relative: float


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
    tolerance: float = 1e-5,
    load_before: Loader | None = None,
    load_after: Loader | None = None,
) -> NumericCheck:
    """Run both programs on `sequences` and compare the nodes of `layers` (name, node before, node after), then the outputs.

    Layers are streamed, so weights of one layer of each program are in memory. Padded positions (attention_mask == 0) are
    not compared: what a padded query gets is unspecified.
    """
    first = PieceRunner(before, load_before, [old for _, old, _ in layers])
    second = PieceRunner(after, load_after, [new for _, _, new in layers])
    worst = {name: 0.0 for name, _, _ in layers}
    run_first = first.run(sequences, [old for _, old, _ in layers] + first.outputs)
    run_second = second.run(sequences, [new for _, _, new in layers] + second.outputs)
    outputs = 0.0
    for a, b in zip(run_first, run_second, strict=True):
        mask = sequences[a.sequence].get("attention_mask")
        for name, old, new in layers:
            if old in a.values and new in b.values:
                worst[name] = _larger(
                    worst[name], relative_difference(a.values[old], b.values[new], mask, token_axis=2)
                )
        for old, new in zip(first.outputs, second.outputs, strict=True):
            if old in a.values and new in b.values:
                outputs = _larger(outputs, relative_difference(a.values[old], b.values[new], mask, token_axis=1))
    found = [Difference(name, value) for name, value in worst.items()]
    return NumericCheck((*found, Difference("outputs", outputs)), tolerance)


def relative_difference(a: Tensor, b: Tensor, mask: Tensor | None = None, token_axis: int = 1) -> float:
    """max |a - b| / max |a| over real tokens; NaN anywhere gives NaN (which is never within a tolerance)."""
    if mask is not None and not bool(mask.all()):
        a, b = a.movedim(token_axis, 1)[mask.bool()], b.movedim(token_axis, 1)[mask.bool()]
    scale = a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)
    return float((a - b).abs().max() / scale)


def _larger(a: float, b: float) -> float:
    """max that keeps NaN."""
    return b if b != b or b > a else a
