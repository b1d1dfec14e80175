"""The tables of the long-context tasks."""

from __future__ import annotations

from collections.abc import Iterable

from ...optimizer.proof.tasks.long import LongResult, Score
from .tables import print_table, table

_HEADS = ("dense", "DSA", "oracle", "window")
_VARIANTS = ("dense", "dsa", "oracle", "window")


def show_long(result: LongResult) -> None:
    """Accuracy and log-probability of the right answer by task and length, then by depth where there are several."""
    settings = result.settings
    print(
        f"long-context tasks, {settings.samples} prompts each, seed {settings.seed}, in {result.haystack}; index_topk {result.index_topk}"
    )
    rows = table("found, % (log-probability, nats/token)", "length", *_HEADS)
    for task in settings.tasks:
        for length in settings.lengths:
            figures = (
                f"{result.accuracy(task, length, variant):.1f} ({result.logprob(task, length, variant):.2f})"
                for variant in _VARIANTS
            )
            rows.add_row(task, str(length), *figures)
    print_table(rows)
    if len(settings.depths) > 1:
        _show_depths(result)


def _show_depths(result: LongResult) -> None:
    deep = [score for score in result.scores if score.depth is not None]
    if not deep:
        return
    rows = table("found by depth of the needle, %", "length", *_HEADS)
    for length in result.settings.lengths:
        for depth in result.settings.depths:
            here = [score for score in deep if (score.length, score.depth) == (length, depth)]
            rows.add_row(f"{depth}% of the text before it", str(length), *(_found(here, name) for name in _VARIANTS))
    print_table(rows)


def _found(scores: Iterable[Score], variant: str) -> str:
    """Of all tasks with needles together."""
    found = [score.accuracy for score in scores if score.variant == variant]
    return f"{sum(found) / len(found):.1f}"
