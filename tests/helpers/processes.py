"""Processes of a session: whether a command's children end with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path


def of_session(session: int) -> Iterator[str]:
    """Names of the living processes of the session, as Linux lists them."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        state, _, _, its_session = rest.split()[:4]
        if its_session == str(session) and state != "Z":
            yield f"{name})"


def survivors(session: int, seconds: float = 2) -> list[str]:
    """Those that are still there after so long."""
    limit = time.monotonic() + seconds
    while found := list(of_session(session)):
        if time.monotonic() > limit:
            return found
        time.sleep(0.02)
    return []
