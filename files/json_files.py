"""JSON from anywhere, read within limits, with one clear line for what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError, short
from .regular import read_within

FETCH_AGAIN = "fetch the file again"
MOST_BYTES = 100_000_000  # the safetensors library's own limit for a header
MOST_VALUES = (
    4_000_000  # a checkpoint of 400 000 tensors; what hostile text of that many values takes is about a gigabyte
)
MOST_DEPTH = 64  # transformers and pydantic walk through values by recursion
_NESTED = (dict, list)  # a union would be made anew for every value


class _NameTwiceError(Exception):
    """A name that an object has twice: json would silently keep the last."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file is absent, not JSON, beyond the limits above, or something else than an
    object."""
    try:
        text = read_within(file, MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {FETCH_AGAIN}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return parse_object(text, str(file))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `text` is; where: begins the line of what is wrong. Raises UserError."""
    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise UserError(f"{where}: more than {MOST_VALUES} values in it; {FETCH_AGAIN}")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except _NameTwiceError as error:
        raise UserError(f"{where}: names {error} twice; {FETCH_AGAIN}") from None
    except ValueError as error:  # bad UTF-8, bad JSON, a number of more than 4300 digits
        raise UserError(f"{where}: not valid JSON ({short(str(error))}); {FETCH_AGAIN}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; {FETCH_AGAIN}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}; {FETCH_AGAIN}")
    _check_depth(value, where)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _NameTwiceError(short(next(name for name, _ in pairs if name in seen or seen.add(name))))  # type: ignore[func-returns-value]
    return found


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, _NESTED)
        ]
        if not level:
            return
    raise UserError(f"{where}: nested more than {MOST_DEPTH} deep; {FETCH_AGAIN}")
