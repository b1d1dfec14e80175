"""The layers that share, chosen by measured loss: as many as it allows.

Which layers those would be is ordered by the mass that a layer loses with an earlier layer's selection: a threshold on it gives a
set of layers, a greater one a larger set. How large it may get is searched by halving, with the loss of the whole model, for what
layers lose together is not the sum of what each one loses (IndexCache, arXiv 2603.12201, searches by loss layer by layer, which
takes a pass over the text for every layer and step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Loss = Callable[[tuple[int, ...]], float]  # nats/token with these layers sharing


@dataclass(frozen=True)
class Tried:
    """A set of layers, and nats/token that it costs beside no sharing."""

    shared: tuple[int, ...]
    loss: float


@dataclass(frozen=True)
class Sharing:
    """shared: numbers of the layers without an indexer, of `layers`; loss: nats/token that they cost on the sequences kept aside for
    such choices; allowed: what they may cost; tried: all that was measured, in that order; lost: per layer, the attention mass that
    it has less with the selection of the layer before it, beside its own indexer's."""

    shared: tuple[int, ...]
    layers: int
    loss: float
    allowed: float
    tried: tuple[Tried, ...]
    lost: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        tried = [{"layers": len(one.shared), "loss": one.loss} for one in self.tried]
        lost = [None, *self.lost[1:]]
        return {
            "shared": list(self.shared), "layers": self.layers, "loss": self.loss, "allowed": self.allowed, "tried": tried,
            "lost_mass": lost,
        }  # fmt: skip


def choose(masses: Sequence[tuple[float, ...]], loss: Loss, allowed: float) -> Sharing:
    """masses: as `captured_masses` gives them. The loss is asked for with no layers first."""
    sets, base, tried = sets_of(masses), loss(()), list[Tried]()
    best, low, high = Tried((), 0.0), 0, len(sets)
    while low < high:  # sets[:low] are allowed, sets[high:] are not
        middle = (low + high) // 2
        tried.append(Tried(sets[middle], loss(sets[middle]) - base))
        if tried[-1].loss <= allowed:
            best, low = tried[-1], middle + 1
        else:
            high = middle
    lost = tuple(of[0] - of[1] if len(of) > 1 else 0.0 for of in masses)
    return Sharing(best.shared, len(masses), best.loss, allowed, tuple(tried), lost)


def sets_of(masses: Sequence[tuple[float, ...]]) -> list[tuple[int, ...]]:
    """Sets of layers, the ones that lose least first, that are different and not empty."""
    thresholds = sorted({of[0] - other for of in masses for other in of[1:]})
    found = dict.fromkeys(_within(masses, threshold) for threshold in thresholds)
    sets = sorted((one for one in found if one), key=len)
    return [one for number, one in enumerate(sets) if not number or len(one) > len(sets[number - 1])]


def _within(masses: Sequence[tuple[float, ...]], threshold: float) -> tuple[int, ...]:
    """Layers that lose no more than `threshold` with the selection of the last layer before them that has one."""
    shared, last = list[int](), 0
    for layer, of in enumerate(masses[1:], start=1):
        back = layer - last
        if back < len(of) and of[0] - of[back] <= threshold:
            shared.append(layer)
        else:
            last = layer
    return tuple(shared)


def passes(layers: int) -> int:
    """Over the text, at most: to see the mass, the loss without sharing, and those that halving takes."""
    return 2 + math.ceil(math.log2(max(1, layers)))


def made_at_most(layers: int) -> float:
    """Indexers that are made, as a multiple of one for each layer: for every set that is tried those that serve several layers, which are
    no more than half of them."""
    return 1 + (passes(layers) - 2) / 2
