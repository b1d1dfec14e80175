"""The tables of what a conversion costs on text."""

from __future__ import annotations

from ...exporters.report.plots import STYLES
from ...optimizer.proof.figures import Quality
from ...optimizer.proof.limits import Measured
from .tables import print_table, table

SELECTIONS = {name: STYLES[name]["label"] for name in ("dsa", "dsa-fp8", "oracle", "window")}


def show_text(found: Measured, layers: bool = True) -> None:
    """Dense against DSA, oracle and window on one text, the sequence that DSA harms most, and the layers."""
    text = found.text
    print(
        f"{found.origin}: dense loss {text.dense_loss:.4f} nats/token (PPL {text.dense_ppl:.4g}), {text.positions} positions, "
        f"length {text.length}"
    )
    rows = table("selection", "loss increase", "s.e.", "PPL ratio", "KL", "s.e.", "same top token")
    for name in (name for name in SELECTIONS if name in text.by_selection):
        rows.add_row(SELECTIONS[name], *_figures(text.by_selection[name]))
    print_table(rows)
    if text.fp8_same_keys is not None:
        print(f"scores in FP8 choose {text.fp8_same_keys:.1%} of the same keys")
    _show_worst(text.by_selection["dsa"])
    if layers:
        rows = table("attention mass captured", "DSA", "oracle", "window", "few positive")
        for layer in found.layers:
            figures = (layer.dsa, layer.oracle, layer.window)
            rows.add_row(layer.name, *(f"{figure:.3f}" for figure in figures), f"{layer.few_positive:.1%}")
        print_table(rows)


def _figures(quality: Quality) -> tuple[str, ...]:
    return (
        f"{quality.loss_delta:+.4f}",
        _error(quality.standard_error),
        f"{quality.ppl_ratio:.4f}",
        f"{quality.kl:.4f}",
        _error(quality.kl_error),
        f"{quality.same_top:.1%}",
    )


def _error(error: float) -> str:
    """One sequence has none."""
    return f"{error:.4f}" if error == error else "-"


def _show_worst(quality: Quality) -> None:
    worst = quality.worst
    if worst is None:
        return
    print(
        f"worst sequence: number {worst.sequence}, loss {worst.loss_delta:+.4f} nats/token; most at token {worst.position} "
        f"({worst.token_delta:+.2f}), after {worst.excerpt or list(worst.tokens)!r}"
    )
