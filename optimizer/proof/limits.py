"""What the quality of a conversion is held against: the limits that always count, and those a user sets with --gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import UsageError
from .evaluate import LayerRecall, TextResult

CALIBRATE_BETTER = "calibrate on more text like it, with --indexer distil or a larger --index-topk"


@dataclass(frozen=True)
class Check:
    """One thing that was held against its limit. detail: where it failed, or what was looked at; remedy: if it fails."""

    name: str
    passed: bool
    value: float
    limit: float
    detail: str
    remedy: str


@dataclass(frozen=True)
class Measured:
    """The figures of one text. origin: its path, or that it was random tokens."""

    origin: str
    text: TextResult
    layers: tuple[LayerRecall, ...]


def better(name: str, value: float, limit: float, detail: str) -> Check:
    """A quality figure, of which less is better; NaN is within no limit."""
    return Check(name, value <= limit, value, limit, detail, CALIBRATE_BETTER)


def quality_checks(found: Measured, max_loss_delta: float) -> list[Check]:
    """On random tokens the loss says little (a model that is sure of the wrong token gains by any damage); the rest does."""
    dsa, window, layers = found.text.by_selection["dsa"], found.text.by_selection["window"], found.layers
    weakest = max(layers, key=lambda layer: layer.chance - layer.dsa)
    missed, allowed = (
        1 - sum(values) / len(layers) for values in ([r.dsa for r in layers], [r.window for r in layers])
    )
    return [
        better("loss increase on text, nats/token", dsa.loss_delta, max_loss_delta, "all layers sparse"),
        better("KL to the dense model, no more than with a window of the same size", dsa.kl, window.kl, "all layers sparse"),
        better("attention mass missed, no more than a window of the same size misses", missed, allowed, "mean of the layers"),
        better("attention mass missed in a layer, no more than chance misses", 1 - weakest.dsa, 1 - weakest.chance, weakest.name),
    ]  # fmt: skip


def with_sharing(checks: Sequence[Check], shared: Sequence[str]) -> list[Check]:
    """Of a model whose layers `shared` have no indexer of their own: that is a remedy, too."""
    if not shared:
        return list(checks)
    some = f"{shared[0]} and {len(shared) - 1} more do" if len(shared) > 1 else f"{shared[0]} does"
    remedy = f"let fewer layers share an indexer ({some}), or {CALIBRATE_BETTER}"
    return [replace(check, remedy=remedy) if check.remedy == CALIBRATE_BETTER else check for check in checks]


def foreign_checks(found: Measured, max_loss_delta: float) -> list[Check]:
    """On text of another domain the budget itself may cost more than the limit; what the indexer adds to the oracle's loss may not."""
    dsa, oracle, window = (found.text.by_selection[name] for name in ("dsa", "oracle", "window"))
    added = dsa.loss_delta - oracle.loss_delta
    return [
        better("loss increase on foreign text beyond the oracle's, nats/token", added, max_loss_delta, found.origin),
        better("KL on foreign text, no more than with a window of the same size", dsa.kl, window.kl, found.origin),
    ]


def fp8_loss(found: Measured) -> tuple[float, str]:
    """Loss that scores in FP8 add to those in float."""
    by_selection = found.text.by_selection
    return by_selection["dsa-fp8"].loss_delta - by_selection["dsa"].loss_delta, found.origin


def few_positive(found: Measured) -> tuple[float, str]:
    """Of the worst layer."""
    worst = max(found.layers, key=lambda layer: _nan_last(layer.few_positive))
    return worst.few_positive, f"{worst.name}, {found.origin}"


def worst_sequence(found: Measured) -> tuple[float, str]:
    """Its loss increase, and where it is."""
    worst = found.text.by_selection["dsa"].worst
    assert worst is not None  # of what was measured on text
    return worst.loss_delta, f"{found.origin}, sequence {worst.sequence}, token {worst.position}: {worst.excerpt!r}"


def oracle_ratio(found: Measured) -> tuple[float, str]:
    """KL as a multiple of the oracle's, which unlike its loss is never near zero from above and below."""
    dsa, oracle = found.text.by_selection["dsa"].kl, found.text.by_selection["oracle"].kl
    return dsa / oracle if oracle > 0 else (1.0 if dsa == 0 else math.inf), found.origin


# Figures by the name of their gate: what the table calls them, and how they are read off one text; the worse text counts.
TEXT_GATES: Mapping[str, tuple[str, Callable[[Measured], tuple[float, str]]]] = {
    "loss": ("loss increase, nats/token", lambda found: (found.text.by_selection["dsa"].loss_delta, found.origin)),
    "ppl-ratio": ("PPL(DSA)/PPL(dense)", lambda found: (found.text.by_selection["dsa"].ppl_ratio, found.origin)),
    "kl": ("KL to the dense model, nats", lambda found: (found.text.by_selection["dsa"].kl, found.origin)),
    "kl-to-oracle": ("KL as a multiple of the oracle's", oracle_ratio),
    "worst-sequence": ("loss increase of the worst sequence, nats/token", worst_sequence),
    "few-positive": ("share of rows with fewer positive scores than index_topk", few_positive),
    "fp8": ("loss that FP8 scores add, nats/token", fp8_loss),
}


def gated(texts: Sequence[Measured], gates: Mapping[str, float]) -> list[Check]:
    """The user's limits on figures of text; every text has to keep them."""
    checks = []
    for name, limit in gates.items():
        if name in TEXT_GATES:
            label, read = TEXT_GATES[name]
            value, detail = max((read(found) for found in texts), key=lambda result: _nan_last(result[0]))
            checks.append(better(f"{label} (--gate {name})", value, limit, detail))
    return checks


def _nan_last(value: float) -> float:
    return math.inf if value != value else value


def read_gates(given: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    """NAME=LIMIT of every --gate. Raises UsageError."""
    gates: dict[str, float] = {}
    for entry in given:
        name, _, number = entry.partition("=")
        if name not in known:
            raise UsageError(f"--gate {entry}: no such figure; known here are {', '.join(known)}")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not math.isfinite(limit):
            raise UsageError(f"--gate {entry}: expected NAME=NUMBER, as in {name}=0.05")
        if name in gates:
            raise UsageError(f"--gate {entry}: {name} is there twice")
        gates[name] = limit
    return gates
