"""What `bench --json` printed, as one HTML page: how fast every model is at every context, each run of it, and against the first."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import plots
from .parts import document, figure, number, table

Found = Mapping[str, Any]
_SPEEDS = {"prefill_tokens_per_second": "prefill, tokens/s", "decode_tokens_per_second": "decode, tokens/s"}


def benched_page(found: Found, title: str) -> str:
    """title: what the file is called. Raises KeyError, TypeError, ValueError or AttributeError for what `bench` does not print."""
    results: Sequence[Found] = found["results"]
    where, names = _where(results), row_names([one["model"] for one in results])
    drawn = [_curve(label, results, names, partial(_value, field)) for field, label in _SPEEDS.items()]
    against = _against(found["against"], names)
    return document(
        title, [where, _figures(results, names), *drawn, against and f"<h2>Against the first</h2>{against}"]
    )  # fmt: skip


def measured_cost(found: Found) -> str:
    """The same as the cost of a token by position, for the page of a report. Raises as `benched_page` does."""
    results: Sequence[Found] = found["results"]
    where, names = _where(results), row_names([one["model"] for one in results])
    drawn = [
        _curve(label.replace("tokens/s", "measured, ms a token"), results, names, partial(_milliseconds, field))
        for field, label in reversed(_SPEEDS.items())
    ]
    said = "A token of a prefill costs what all tokens up to there do on average; a decoded one is the one at that position."
    return "\n".join([where, f"<p>{said}</p>", *drawn, _against(found["against"], names)])


def _where(results: Sequence[Found]) -> str:
    if not results:
        raise ValueError("no run in it")
    first = results[0]
    where = first["gpu"] if first["device"] != "cpu" and first["gpu"] else f"{first['threads']} of {first['cpus']} CPUs"
    said = (
        f"Batch {first['batch']}, {where}, torch {first['torch']}, random tokens. Models took turns; figures are medians of "
        f"{len(first['runs'])} rounds, points are the rounds."
    )
    return f"<p>{html.escape(said)}</p>"


def row_names(models: Sequence[str]) -> dict[str, str]:
    """What a row is called: the last part of a path, or all of it where another has the same."""
    last = {model: Path(model).name or model for model in models}
    taken = list(last.values())
    return {model: name if taken.count(name) == 1 else model for model, name in last.items()}


def _figures(results: Sequence[Found], names: Mapping[str, str]) -> str:
    rows = [
        [
            names[one["model"]], one["runtime"], str(one["context"]), number(one["prefill_seconds"], ".2f"),
            number(one["prefill_tokens_per_second"], ".0f"), number(one["decode_tokens_per_second"], ".1f"),
            number(one["decode_ms"]["p50"], ".2f"), number(one["decode_ms"]["p99"], ".2f"),
            number(one["peak_memory"] / 2**30, ".2f"),
        ]
        for one in results
    ]  # fmt: skip
    heads = [
        "model", "runtime", "context", "first token, s", "prefill, tokens/s", "decode, tokens/s", "step p50, ms", "p99", "memory, GiB",
    ]  # fmt: skip
    return table(heads, rows)


def _curve(label: str, results: Sequence[Found], names: Mapping[str, str], value: Callable[[Found], float]) -> str:
    of_model: dict[str, list[tuple[float, float, list[float]]]] = {}
    for one in sorted(results, key=lambda one: one["context"]):
        of_model.setdefault(names[one["model"]], []).append((one["context"], value(one), [*map(value, one["runs"])]))
    return figure(label, plots.speeds(label, of_model, "context, tokens", label))


def _value(field: str, one: Found) -> float:
    return float(one[field])


def _milliseconds(field: str, one: Found) -> float:
    return 1e3 / float(one[field])


def _against(against: Sequence[Found], names: Mapping[str, str]) -> str:
    if not against:
        return ""
    rows = [
        [
            names[one["model"]], str(one["context"]), *_ratio(one["prefill"]), *_ratio(one["decode"]),
            number(one["peak_memory"], ".2f"),
        ]
        for one in against
    ]  # fmt: skip
    heads = ["model", "context", "prefill", "between", "decode", "between", "memory"]
    said = (
        f"Times as fast as {names[against[0]['first']]}, and what it lies between with 95 % certainty. Where that includes 1, no "
        "difference is shown."
    )
    return f"<p>{html.escape(said)}</p>{table(heads, rows)}"


def _ratio(one: Found) -> tuple[str, str]:
    if one["differs"] is None:
        return number(one["ratio"], ".2f"), "one round: no telling"
    return number(one["ratio"], ".2f"), f"{one['low']:.2f} to {one['high']:.2f}" + (
        "" if one["differs"] else ": no difference shown"
    )
