"""What pages are made of: one file each, no script, nothing fetched; light or dark as the browser is."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

_STYLE = """
:root { color-scheme: light dark; --quiet: #59636e; --line: #d0d7de; --bad: #b3261e; --good: #1a6b3c }
@media (prefers-color-scheme: dark) { :root { --quiet: #9aa4af; --line: #3d444d; --bad: #ff8a80; --good: #7ee2a8 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
svg { width: 100%; height: auto } .quiet { color: var(--quiet) } .bad { color: var(--bad) } .good { color: var(--good) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 1rem }
.pair pre, pre.prompt { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .9rem }
mark { background: none; color: inherit; text-decoration: underline 2px var(--bad); text-underline-offset: .2em }
td { overflow-wrap: anywhere } blockquote { border-left: 3px solid var(--line); margin: .5rem 0; padding-left: 1rem }
"""
# What HTML and UTF-8 cannot hold; paths and tokens may have them.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
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
    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    made = "".join(row("td", cells) for cells in rows)
    return f'<div class="wide" tabindex="0"><table><thead>{row("th", heads)}</thead><tbody>{made}</tbody></table></div>'


def number(value: float | None, shape: str) -> str:
    """NaN and infinities are null in JSON."""
    return "-" if value is None or not math.isfinite(value) else format(value, shape)
