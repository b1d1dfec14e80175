"""bench: how fast models are, side by side: checkpoints dense and sparse, exported folders, engines. Plain data, as --json prints it.

Runs are interleaved, model after model in every round, since machines change their speed from minute to minute: two models are
compared by the ratios within rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import UsageError, short
from ..runtime.devices import usable_device
from .answers.timing import Run, timed_apart

# Student's t for 95 %, two-sided, by degrees of freedom from 1
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
MOST_ROUNDS = len(_T) + 1
MOST = 2**31 - 1  # fixed by what a tensor's size may be in every runtime
_FIGURES = ("prefill_tokens_per_second", "decode_tokens_per_second")


def bench(
    models: Sequence[str],
    contexts: Sequence[int | None] = (None,),
    *,
    batch: int = 1,
    tokens: int = 64,
    rounds: int = 3,
    runtime: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    time_it: Callable[[Run], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """`results`: medians for each model and context over `rounds`, with every run; `against`: how much faster every other model is
    than the first. contexts: tokens of a prompt, None for a default. dtype: of checkpoints, None: float32. time_it: times one run, None in
    a process of its own.

    Raises UserError where a model cannot be run or does not take these sizes, UsageError for sizes out of range.
    """
    _check_sizes(models, contexts, batch, tokens, rounds)
    if device != "cpu":
        usable_device(device)
    runs: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    longest_first = sorted(contexts, key=lambda context: -(context or 0))  # what does not fit is known at once
    work = list(product(range(rounds), longest_first, models))
    default = None
    for number, (_, context, model) in enumerate(work):
        found = (time_it or timed_apart)(Run(model, batch, context or default, tokens, runtime, device, dtype))
        default = default or found["context"]  # what the first model takes is what all are given
        runs.setdefault((model, context), []).append(found)
        if on_progress:
            on_progress("bench", number + 1, len(work))
    asked = list(product(reversed(longest_first), models))
    others = [(context, model) for context, model in asked if model != models[0]]
    return {
        "results": [{"model": model, **_summary(runs[model, context])} for context, model in asked],
        "against": [_against(model, models[0], runs[model, at], runs[models[0], at]) for at, model in others],
    }


def _check_sizes(models: Sequence[str], contexts: Sequence[int | None], batch: int, tokens: int, rounds: int) -> None:
    sizes = [("--batch", batch), ("--tokens", tokens), *(("--context", size) for size in contexts if size is not None)]
    for flag, size in sizes:
        if not 1 <= size <= MOST:
            raise UsageError(f"{flag} {short(size)}: expected 1 to {MOST}")
    if not 1 <= rounds <= MOST_ROUNDS:
        raise UsageError(f"--rounds {short(rounds)}: expected 1 to {MOST_ROUNDS}")
    if len({Path(model).resolve() for model in models}) != len(models):
        raise UsageError("a model is given twice; its runs would be compared with themselves")


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one model at one context: the median of every figure."""
    same = {
        name: runs[0][name]
        for name in ("runtime", "dtype", "batch", "context", "torch", "threads", "gpu", "cpus", "device")
    }
    figures = {
        name: statistics.median(run[name] for run in runs) for name in (*_FIGURES, "prefill_seconds", "peak_memory")
    }
    decode = {part: statistics.median(run["decode_ms"][part] for run in runs) for part in runs[0]["decode_ms"]}
    return {**same, **figures, "decode_ms": decode, "runs": list(runs)}


def _against(
    model: str, first: str, runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    ratios = {
        name.partition("_")[0]: ratio([run[name] / other[name] for run, other in zip(runs, others, strict=True)])
        for name in _FIGURES
    }
    memory = statistics.median(
        run["peak_memory"] / other["peak_memory"] for run, other in zip(runs, others, strict=True)
    )
    return {"model": model, "first": first, "context": runs[0]["context"], **ratios, "peak_memory": memory}


def ratio(rounds: Sequence[float]) -> dict[str, Any]:
    """The geometric mean of ratios, its 95 % interval (Student's t on logarithms; None with one round), and whether 1 is outside of it."""
    logs = [math.log(value) for value in rounds]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return {"ratio": math.exp(mean), "low": None, "high": None, "differs": None}
    half = _T[len(logs) - 2] * statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half), "differs": abs(mean) > half
    }  # fmt: skip
