"""What pages are made of: one file each, no script, nothing fetched; light or dark as the browser is."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

_STYLE = """
:root { color-scheme: light dark; --quiet: #59636e; --line: #d0d7de; --bad: #b3261e; --good: #1a6b3c }
@media (prefers-color-scheme: dark) { :root { --quiet: #9aa4af; --line: #3d444d; --bad: #ff8a80; --good: #7ee2a8 } }
html { background: Canvas; color: CanvasText }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
figure { margin: 1.5rem 0 } svg { display: block; width: 100%; min-width: 34rem; height: auto }
.quiet { color: var(--quiet) } .bad { color: var(--bad) } .good { color: var(--good) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid var(--line); overflow-wrap: break-word }
td { min-width: 5rem; max-width: 24rem } td:first-child { min-width: 8rem }
.number { text-align: right; min-width: 0 } td.number { white-space: nowrap }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 1rem }
.pair pre, pre.prompt { white-space: pre-wrap; margin: 0; font-size: .9rem }
mark { background: none; color: inherit; text-decoration: underline 2px var(--bad); text-underline-offset: .2em }
blockquote { border-left: 3px solid var(--line); margin: .5rem 0; padding-left: 1rem }
"""
# What HTML and UTF-8 cannot hold; paths and tokens may have them.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# A number as `number` writes it, or two: an accuracy with its log-probability.
_NUMBER = re.compile(r"-|[-+]?[0-9][0-9.]*(e[-+][0-9]+)?%?( \([-+0-9.]+\))?")
_LONGEST = 1e7  # fixed by what a table's cell holds
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, parts: Iterable[str]) -> str:
    """The whole file. title: text; parts: HTML."""
    name = html.escape(title)
    whole = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{_STYLE}</style></head>\n'
        f"<body><main><h1>{name}</h1>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )
    return _NO_TEXT.sub("\ufffd", whole)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that hold numbers alone stand right, and no number is broken."""
    numbers = [all(_NUMBER.fullmatch(row[column]) for row in rows) for column in range(len(heads))]

    def row(tag: str, cells: Sequence[str]) -> str:
        made = (
            f"<{tag}{' class=number' * one}>{html.escape(cell)}</{tag}>"
            for cell, one in zip(cells, numbers, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    made = "".join(row("td", cells) for cells in rows)
    return f'<div class="wide" tabindex="0"><table><thead>{row("th", heads)}</thead><tbody>{made}</tbody></table></div>'


def figure(caption: str, svg: str) -> str:
    """A plot with what it shows, also for those who do not see it. svg: "" where there is nothing to be drawn."""
    said = html.escape(caption)
    if not svg:
        return f'<p class="quiet">{said}: no finite figure to draw.</p>'
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{said}" ', 1)
    return (
        f'<figure><div class="wide" tabindex="0">{labelled}</div><figcaption class="quiet">{said}</figcaption></figure>'
    )


def number(value: float | None, shape: str) -> str:
    """NaN and infinities are null in JSON. What would be longer than a cell is told by its order."""
    if value is None or not math.isfinite(value):
        return "-"
    return format(value, shape) if abs(value) < _LONGEST else format(value, ".3g")
