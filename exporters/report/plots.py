"""The plots of a report, as SVG that takes the page's own text colour, so that light and dark are one file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UsageError

_INK = "#123456"  # stands for the page's text colour until the SVG is written
_SIZE = (7.2, 3.0)  # inches: a page's column
# Told apart by line and marker too, since not everybody sees colours; chosen for 3 to 1 on white and on black.
STYLES = {
    "dsa": {"color": "#2a7de1", "marker": "o", "label": "DSA"},
    "dsa-fp8": {"color": "#8b5cf6", "marker": "x", "label": "DSA, scores in FP8"},
    "oracle": {"color": "#15935a", "marker": "s", "linestyle": "--", "label": "oracle top-k"},
    "window": {"color": "#d97a1d", "marker": "^", "linestyle": ":", "label": "window + 4 sinks"},
    "chance": {"color": "#808a96", "marker": "v", "linestyle": "-.", "label": "chance"},
    "dense": {"color": "#808a96", "marker": "D", "linestyle": "-.", "label": "dense"},
}
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def check_library() -> None:
    """Raises UsageError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("a report's plots need matplotlib; pip install 'mla2dsa[report]'") from None


def lines(name: str, series: Lines, x: str, y: str, *, log: bool = False) -> str:
    """SVG of curves by their names in STYLES. name: of the plot, different from others on the page."""
    figure, axes = _axes(x, y)
    for key, (places, values) in series.items():
        axes.plot(places, values, markersize=4, linewidth=1.4, zorder=3 if key == "dsa" else 2, **STYLES[key])
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    else:
        axes.axhline(0, color=_INK, linewidth=0.6)
    return _svg(name, figure, axes)


def bars(name: str, values: Mapping[str, Sequence[float]], x: str, y: str) -> str:
    """SVG of a point for each layer, sequence or the like, numbered from 0."""
    figure, axes = _axes(x, y)
    for key, points in values.items():
        style = {**STYLES[key], "linestyle": "none"}
        axes.plot(range(len(points)), points, markersize=5, zorder=3 if key == "dsa" else 2, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(name, figure, axes)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_settings()):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(color=_INK, alpha=0.15, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _settings() -> Any:
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    return {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9, **dict.fromkeys(inked, _INK)}


def _svg(name: str, figure: Any, axes: Any) -> str:
    import matplotlib

    with matplotlib.rc_context({**_settings(), "svg.hashsalt": name}):  # else a page has the same ids twice
        axes.legend(frameon=False, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        made = io.StringIO()
        figure.savefig(made, format="svg", transparent=True, metadata={"Date": None})
    svg = made.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
