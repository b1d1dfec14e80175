"""The plots of a report, as SVG that takes the page's own text colour, so that light and dark are one file."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ...errors import UsageError, short

INSTALL = "pip install 'mla2dsa[report]'"
_INK = "#123456"  # stands for the page's text colour until the SVG is written
_FEW_ORDERS = 100  # of magnitude, where the powers of ten are too few to read values by
_LONGEST_LABEL = 24  # characters: four labels stand side by side above a plot
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


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_library() -> None:
    """Raises UsageError where matplotlib is not installed."""
    if not can_draw():
        raise UsageError(f"a report's plots need matplotlib; {INSTALL}")
    try:
        _matplotlib()
    except Exception as error:
        raise UsageError(
            f"matplotlib is installed, but cannot be imported ({type(error).__name__}: {error})"
        ) from error


def _matplotlib() -> Any:
    """The module, whatever backend the environment wants: none is used, and a wrong one would keep it from being imported."""
    wanted = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
        import matplotlib.figure
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    return matplotlib


def lines(
    name: str, series: Lines, x: str, y: str, *, orders: bool = False, doubled: bool = False, percent: bool = False
) -> str:
    """SVG of curves by their names in STYLES; "" where no value is finite. name: of the plot, different from others on the page. orders:
    of magnitude apart, so that y is logarithmic if it can be; doubled: x is; percent: y is 0 to 100."""
    if not any(math.isfinite(value) for _, values in series.values() for value in values):
        return ""
    figure, axes = _axes(x, y)
    for key, (places, values) in series.items():
        axes.plot(places, values, markersize=4, linewidth=1.4, zorder=3 if key == "dsa" else 2, **STYLES[key])
    if doubled:
        _doubled(axes, ())
    if percent:
        axes.set_ylim(-5, 105)
    if not (orders and _by_orders(axes, [value for _, values in series.values() for value in values])):
        axes.axhline(0, color=_INK, linewidth=0.6)
    return _svg(name, figure, axes)


def bars(name: str, values: Mapping[str, Sequence[float]], x: str, y: str, *, orders: bool = False) -> str:
    """SVG of a point for each layer, sequence or the like, numbered from 0; "" where none is finite. orders: as in `lines`."""
    if not any(math.isfinite(value) for points in values.values() for value in points):
        return ""
    figure, axes = _axes(x, y)
    for key, points in values.items():
        style = {**STYLES[key], "linestyle": "none"}
        axes.plot(range(len(points)), points, markersize=5, zorder=3 if key == "dsa" else 2, **style)
    _numbered(axes.xaxis, max(map(len, values.values())))
    if orders:
        _by_orders(axes, [value for points in values.values() for value in points])
    return _svg(name, figure, axes)


def speeds(name: str, series: Mapping[str, Sequence[tuple[float, float, Sequence[float]]]], x: str, y: str) -> str:
    """SVG of a curve for each model by its name: (context, median, every run) of each of its points. Both axes are logarithmic. The
    first, which the others are compared with, looks as dense does on other plots, the second as DSA."""
    figure, axes = _axes(x, y)
    looks = [STYLES["dense"], *(style for key, style in STYLES.items() if key not in ("dense", "chance"))]
    every: list[float] = []
    for number, (label, points) in enumerate(series.items()):
        filled = {} if number < len(looks) else {"markerfacecolor": "none"}
        style = {**looks[number % len(looks)], **filled, "label": short(label, _LONGEST_LABEL)}
        contexts, medians, runs = zip(*points, strict=True)
        axes.plot(contexts, medians, markersize=5, linewidth=1.4, zorder=3, **style)
        for context, of_it in zip(contexts, runs, strict=True):
            axes.plot(
                [context] * len(of_it),
                of_it,
                color=style["color"],
                marker="_",
                markersize=9,
                linestyle="none",
                alpha=0.6,
            )
            every += of_it
    _doubled(axes, sorted({point[0] for points in series.values() for point in points}))
    _by_orders(axes, every)
    return _svg(name, figure, axes)


def _numbered(axis: Any, count: int) -> None:
    """Ticks at whole numbers; a single one has no range that matplotlib could find them in."""
    if count == 1:
        axis.set_ticks([0])
    else:
        axis.get_major_locator().set_params(integer=True)


def _doubled(axes: Any, ticks: Sequence[float]) -> None:
    """A logarithmic x with these ticks, or those of matplotlib."""
    axes.set_xscale("log", base=2)
    if ticks:
        axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")


def _by_orders(axes: Any, values: Sequence[float]) -> bool:
    """A logarithmic y, where all values have a logarithm: rounding makes some KLs nought or less."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0:
        return False
    axes.set_yscale("log")
    if max(finite) < _FEW_ORDERS * min(finite):
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if 1e-4 <= value < 1e6 else f"{value:.0e}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    return True


def maps(name: str, shares: Mapping[str, Sequence[Sequence[float]]], position: int) -> str:
    """SVG of panels side by side, by their names in STYLES: rows are layers, columns stretches of the keys 0..position, and shares of 0
    to 1 are as opaque as they are large."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_settings()):
        figure = Figure(
            figsize=(_SIZE[0], min(_SIZE[0], 1.3 + 0.12 * max(map(len, shares.values())))), layout="constrained"
        )
        for panel, (key, rows) in enumerate(shares.items(), 1):
            color = STYLES[key]["color"]
            axes: Any = figure.add_subplot(
                1, len(shares), panel, xlabel="position of the keys", title=STYLES[key]["label"]
            )
            axes.imshow(
                rows, aspect="auto", interpolation="none", vmin=0, vmax=1, extent=(0, position + 1, len(rows) - 0.5, -0.5),
                cmap=LinearSegmentedColormap.from_list(key, [f"{color}00", f"{color}ff"]),
            )  # fmt: skip
            _numbered(axes.yaxis, len(rows))
            axes.set_ylabel("layer" if panel == 1 else "")
    return _svg(name, figure)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_settings()):
        figure = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(color=_INK, alpha=0.15, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _settings() -> Any:
    """matplotlib's own, not those of the user's matplotlibrc, which may keep images outside of the file."""
    own = {name: value for name, value in _matplotlib().rcParamsDefault.items() if not name.startswith("backend")}
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    return {
        **own, "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, **dict.fromkeys(inked, _INK)
    }  # fmt: skip


def _svg(name: str, figure: Any, axes: Any = None) -> str:
    """axes: those to put a legend above. Ids begin with the plot's name, else a page has the same ones twice."""
    matplotlib, made = _matplotlib(), io.StringIO()
    with matplotlib.rc_context({**_settings(), "svg.hashsalt": name}):
        if axes is not None:
            axes.legend(frameon=False, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        figure.savefig(made, format="svg", transparent=True, metadata={"Date": None})
    svg = made.getvalue()
    own = re.sub(r"[^a-z0-9]+", "-", name.lower())
    svg = re.sub(r'( id="|="#|url\(#)', rf"\g<1>{own}-", svg[svg.index("<svg") :])
    return svg.replace(_INK, "currentColor")
