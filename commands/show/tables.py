"""How results are printed: one JSON object, or tables."""

from __future__ import annotations

import json
import sys
from typing import Any

from ...files.finite import finite


def print_json(value: Any) -> None:
    """One object, strict JSON: NaN and infinities become null."""
    print(json.dumps(finite(value), indent=1, default=str, allow_nan=False))


def table(*columns: str) -> Any:
    """An empty table: the first column is text, the others are numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return made


def print_table(made: Any) -> None:
    """120 characters wide where stdout is no terminal."""
    from rich.console import Console

    # Without markup: a path may have brackets in it.
    Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, emoji=False).print(made)
