"""Block sizes, warps and stages of each kernel: a table in data (`tuning.json`), read, never measured, at run time.

A row of the table says from which GPU architecture on it holds ("sm": 80 is 8.0), for which element type, and up to how
many heads and channels; what it leaves out it holds for. Of the rows that hold, the newest architecture's comes first,
then the one with the fewest heads, then with the fewest channels. Rows of sm 0 are for tests in the interpreter.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from ...errors import UserError

_CLASSES = {"bf16": "half", "fp16": "half", "fp32": "fp32", "fp8e4nv": "fp8"}
_CONDITIONS = ("sm", "dtype", "heads", "width")
_ANY = 1 << 30


@cache
def table() -> dict[str, list[dict[str, int | str]]]:
    """Kernel name -> rows."""
    content: dict[str, list[dict[str, int | str]]] = json.loads(files(__package__).joinpath("tuning.json").read_text())
    return content


@cache
def _row(kernel: str, sm: int, dtype: str, heads: int, width: int) -> tuple[tuple[str, int], ...]:
    fitting = [
        row
        for row in table()[kernel]
        if int(row["sm"]) <= sm
        and row.get("dtype", _CLASSES[dtype]) == _CLASSES[dtype]
        and heads <= int(row.get("heads", _ANY))
        and width <= int(row.get("width", _ANY))
    ]
    if not fitting:
        raise UserError(f"no block sizes for {kernel} on sm_{sm} with {dtype}, {heads} heads and {width} channels")
    best = min(fitting, key=lambda row: (-int(row["sm"]), int(row.get("heads", _ANY)), int(row.get("width", _ANY))))
    return tuple((name, int(value)) for name, value in best.items() if name not in _CONDITIONS)


def blocks(kernel: str, sm: int, dtype: str = "fp32", heads: int = 0, width: int = 0) -> dict[str, int]:
    """The row for this case. sm: 80, 89, 90, 100, 120 or any other architecture from 80 on, 0 for the interpreter;
    dtype: Triton's name ("bf16", "fp16", "fp32", "fp8e4nv"). Raises UserError if the table has none."""
    return dict(_row(kernel, sm, dtype, heads, width))
