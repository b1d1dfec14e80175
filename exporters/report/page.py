"""report.json, or what `verify --json` printed, as one HTML page."""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .parts import document, figure, number, table

Report = Mapping[str, Any]
_LOG = logging.getLogger(__name__)
# Fixed by what a reader should look at first: a layer that loses more of the oracle's mass than this.
_WEAK = 0.03


def page_title(source: Path, what: str = "dense and sparse side by side") -> str:
    """What a page says of a checkpoint's folder or a file."""
    return f"{source.resolve().name}: {what}"


def page(report: Report, title: str, measured: str = "") -> str:
    """report: a report.json, or a verification alone. measured: what `measured_cost` says of a `bench`. Raises KeyError, TypeError,
    ValueError or AttributeError for what is neither."""
    found: Report = report.get("verification", report)
    parts = [_head(report, found), _text("On text", found)]
    if found.get("foreign"):
        parts.append(_text("On text of another domain", found["foreign"]))
    parts += [
        _layers(found["layers"]),
        _maps(found["layers"]),
        _long(found.get("long")),
        _cost(report.get("plan"), measured),
        _checks(found),
    ]
    return document(title, filter(None, parts))


def page_if_any(title: str, report: Report) -> str | None:
    """None where it cannot be drawn, for which nobody should lose a checkpoint: `mla2dsa report` says why."""
    try:
        return page(report, title)
    except Exception as error:
        _LOG.info("no page of the report could be drawn: %s: %s", type(error).__name__, error)
        return None


def _head(report: Report, found: Report) -> str:
    said, plan = [], report.get("plan")
    if plan:
        indexer = plan["indexer"]
        said.append(
            f"Converted from {plan['model']} ({plan['model_type']}, {len(plan['layers'])} MLA layers): index_topk "
            f"{indexer['index_topk']}, {indexer['index_n_heads']} index heads of {indexer['index_head_dim']}, {plan['source']}; "
            f"written as {plan['layout']}."
        )
    failed = [check["name"] for check in found["checks"] if not check["passed"]]
    word = f'<p class="bad"><strong>Failed</strong>: {html.escape("; ".join(failed))}</p>' if failed else ""
    passed = f'<p class="good"><strong>Passed</strong>: {len(found["checks"])} checks.</p>'
    skipped = [f"Not checked: {html.escape(reason)}." for reason in found.get("skipped", ())]
    return (word or passed) + "".join(f"<p>{html.escape(line)}</p>" for line in said) + "".join(
        f'<p class="quiet">{line}</p>' for line in skipped
    )  # fmt: skip


def _text(title: str, found: Report) -> str:
    text = found["text"]
    said = (
        f"{found['origin']}: dense loss {number(text['dense_loss'], '.4f')} nats/token over {text['positions']} positions that "
        f"have more than index_topk keys, sequences of {text['length']} tokens."
    )
    rows = [
        [
            plots.STYLES[name]["label"], number(one["loss_delta"], "+.4f"), number(one["standard_error"], ".4f"),
            number(one.get("ppl_ratio"), ".4f"), number(one["kl"], ".4f"), number(one["same_top"], ".1%"),
        ]
        for name, one in text["by_selection"].items()
    ]  # fmt: skip
    heads = ["selection", "loss increase, nats/token", "s.e.", "PPL ratio", "KL, nats", "same top token"]
    worst = text["by_selection"]["dsa"].get("worst")
    return "\n".join(
        [f"<h2>{title}</h2>", f"<p>{html.escape(said)}</p>", table(heads, rows), _curves(title, text), _worst(worst)]
    )


def _curves(title: str, text: Report) -> str:
    by_selection = {name: one for name, one in text["by_selection"].items() if one.get("by_position")}
    if not by_selection:
        return ""
    drawn = []
    for field, label in (("loss_delta", "loss increase, nats/token"), ("kl", "KL to dense, nats")):
        curves = {
            name: ([(s["first"] + s["last"]) / 2 for s in one["by_position"]], _floats(s[field] for s in one["by_position"]))
            for name, one in by_selection.items()
        }  # fmt: skip
        svg = plots.lines(f"{title} {field}", curves, "position", label, orders=field == "kl")
        drawn.append(figure(f"{label}, by position", svg))
    kls = {name: _floats(one["sequence_kls"]) for name, one in by_selection.items() if one.get("sequence_kls")}
    if kls:
        drawn.append(
            figure(
                "KL of every sequence",
                plots.bars(f"{title} sequences", kls, "sequence", "KL to dense, nats", orders=True),
            )
        )
    return "\n".join(drawn)


def _worst(worst: Report | None) -> str:
    if not worst:
        return ""
    said = (
        f"The sequence that DSA harms most is number {worst['sequence']} ({number(worst['loss_delta'], '+.4f')} nats/token); most at "
        f"token {worst['position']} ({number(worst['token_delta'], '+.2f')}), after:"
    )
    return f"<p>{said}</p><blockquote>{html.escape(worst['excerpt'] or str(list(worst['tokens'])))}</blockquote>"


def _layers(layers: Sequence[Report]) -> str:
    names = ("dsa", "oracle", "window", "chance")
    values = {name: _floats(layer[name] for layer in layers) for name in names}
    drawn = plots.bars("layers", values, "layer", "attention mass captured")
    weak = [layer for layer in layers if (layer["oracle"] or 0) - (layer["dsa"] or 0) > _WEAK]
    said = "No layer loses more than 3 % of the attention mass against the best choice of as many keys."
    if weak:
        rows = [[layer["name"], *(number(layer[name], ".3f") for name in names)] for layer in weak]
        said = (
            "Layers that capture over 3 % less attention mass than the best choice of as many keys does. Where the oracle itself is low, "
            "only a larger index_topk helps; where DSA is well below it, more calibration text or --indexer distil does."
        )
        return f"<h2>Layers</h2>{figure('Attention mass', drawn)}<p>{said}</p>" + table(["layer", *names], rows)
    return f"<h2>Layers</h2>{figure('Attention mass', drawn)}<p>{said}</p>"


def _maps(layers: Sequence[Report]) -> str:
    """A plot for each query that every layer has a map of; none in reports of versions that made no maps."""
    drawn = []
    for of_query in zip(*(layer.get("maps") or () for layer in layers), strict=True):
        position, bins = of_query[0]["position"], len(of_query[0]["dsa"])
        keys = (position + 1) / bins  # of a stretch
        shares = {
            name: [[min(1.0, count / keys) for count in one[name]] for one in of_query] for name in ("dsa", "oracle")
        }
        drawn.append(figure(f"Query at position {position}", plots.maps(f"query {position}", shares, position)))
    if not drawn:
        return ""
    said = (
        "Which keys are chosen for some queries of the first sequence: the stronger the colour, the larger the share of the keys "
        "there that the layer takes. Beside DSA's choice stands that of the most dense attention."
    )
    return f"<h2>Selections</h2><p>{said}</p>" + "\n".join(drawn)


def _long(found: Report | None) -> str:
    if not found:
        return ""
    variants = list(dict.fromkeys(one["variant"] for one in found["scores"]))
    answered: dict[tuple[str, str], dict[str, str]] = {}
    for one in found["scores"]:
        task = one["task"] + ("" if one["depth"] is None else f", {one['depth']} % of the text before it")
        told = f"{number(one['accuracy'], '.1f')} ({number(one['logprob'], '+.2f')})"
        answered.setdefault((task, str(one["length"])), {})[one["variant"]] = told
    rows = [[*asked, *(told.get(name, "-") for name in variants)] for asked, told in answered.items()]
    heads = ["task", "tokens", *(plots.STYLES[name]["label"] for name in variants)]
    said = (
        f"Prompts in {found['haystack']}, index_topk {found['index_topk']}. Found, in percent, and the log-probability of the right "
        "answer, nats a token."
    )
    return f"<h2>Long-context tasks</h2><p>{html.escape(said)}</p>{_by_depth(found['scores'])}{table(heads, rows)}"


def _by_depth(scores: Sequence[Report]) -> str:
    """A plot for each task whose needles lie at depths, and length."""
    drawn = []
    for task, length in dict.fromkeys((one["task"], one["length"]) for one in scores if one["depth"] is not None):
        mine = [one for one in scores if (one["task"], one["length"]) == (task, length)]
        curves = {
            name: ([one["depth"] for one in mine if one["variant"] == name],
                   _floats(one["accuracy"] for one in mine if one["variant"] == name))
            for name in dict.fromkeys(one["variant"] for one in mine)
        }  # fmt: skip
        svg = plots.lines(f"{task} {length}", curves, "text before the needle, %", "found, %", percent=True)
        drawn.append(figure(f"{task}, {length} tokens", svg))
    return "\n".join(drawn)


def _cost(plan: Report | None, measured: str) -> str:
    """What a bench measured, below attention of one decoded token, counted from the sizes; what a GPU makes of it is `plan --cost`'s."""
    parts = [_counted(plan) if plan else "", measured]
    return "\n".join(["<h2>Cost by position</h2>", *filter(None, parts)]) if any(parts) else ""


def _counted(plan: Report) -> str:
    counted = plan["decode_attention_flops"]
    lengths = [int(length) for length in counted]
    curves = {name: (lengths, [one[name] for one in counted.values()]) for name in ("dense", "dsa")}
    drawn = plots.lines("cost", curves, "position", "FLOPs of attention", orders=True, doubled=True)
    return figure("Attention of one decoded token, all layers, counted", drawn)


def _checks(found: Report) -> str:
    rows = [
        [
            ("passed: " if check["passed"] else "FAILED: ") + check["name"], number(check["value"], ".3g"),
            number(check["limit"], ".3g"), check["detail"] if check["passed"] else f"{check['detail']}; {check['remedy']}",
        ]
        for check in found["checks"]
    ]  # fmt: skip
    return "<h2>Checks</h2>" + table(["check", "value", "at most", "what was looked at"], rows)


def _floats(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]
