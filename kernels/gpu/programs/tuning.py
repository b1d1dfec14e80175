"""Block sizes, warps and stages of each kernel: a table in data (`tuning.json`), read, never measured, at run time.

A row says from which GPU architecture on it holds ("sm": 80 is 8.0), for which element type ("half" is both of 16
bits), and up to how many heads and channels; what it leaves out it holds for. The rows of the newest architecture that
has any for the element type are looked at: of those that hold, the one with the fewest heads, then with the fewest
channels. Rows of sm 0 are the interpreter's, for tests. Architectures with 99 KB of shared memory (86, 89, 120) have
smaller blocks than those before and after them.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from ....errors import UserError

_CLASSES = {"bf16": "half", "fp16": "half", "fp32": "fp32", "fp8e4nv": "fp8"}
_CONDITIONS = ("sm", "dtype", "heads", "width")
_ANY = 1 << 30


class NoBlocks(UserError):
    """The table has no row for a case: what one block needs does not fit the architecture."""


@cache
def table() -> dict[str, list[dict[str, int | str]]]:
    """Kernel name -> rows."""
    content: dict[str, list[dict[str, int | str]]] = json.loads(files(__package__).joinpath("tuning.json").read_text())
    return content


@cache
def _row(kernel: str, sm: int, dtype: str, heads: int, width: int) -> tuple[tuple[str, int], ...]:
    kind = _CLASSES[dtype]
    least = 1 if sm else 0
    rows = [row for row in table()[kernel] if least <= int(row["sm"]) <= sm and row.get("dtype", kind) == kind]
    newest = max((int(row["sm"]) for row in rows), default=0)
    limits = [(int(row.get("heads", _ANY)), int(row.get("width", _ANY)), row) for row in rows if row["sm"] == newest]
    fitting = [(most, widest, row) for most, widest, row in limits if heads <= most and width <= widest]
    if not fitting:
        raise NoBlocks(f"no block sizes for {kernel} on sm_{sm} with {dtype}, {heads} heads and {width} channels")
    best = min(fitting, key=lambda entry: entry[:2])[2]
    return tuple((name, int(value)) for name, value in best.items() if name not in _CONDITIONS)


def blocks(kernel: str, sm: int, dtype: str = "fp32", heads: int = 0, width: int = 0) -> dict[str, int]:
    """The row for this case. sm: 80, 89, 90, 100, 120 or any other architecture from 80 on, 0 for the interpreter;
    dtype: Triton's name ("bf16", "fp16", "fp32", "fp8e4nv"). Raises NoBlocks if the table has none."""
    return dict(_row(kernel, sm, dtype, heads, width))
