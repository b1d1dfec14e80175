"""JSON files, read with one clear line for what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError

FETCH_AGAIN = "fetch the file again"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file is absent, not JSON, or something else than an object."""
    try:
        value = json.loads(file.read_bytes().decode())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {FETCH_AGAIN}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # both bad UTF-8 and bad JSON
        raise UserError(f"{file}: not valid JSON ({error}); {FETCH_AGAIN}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(value).__name__}; {FETCH_AGAIN}")
    return value
