"""Memory that a program may still take."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_memory() -> int:
    """Bytes, the page cache counted as free where the kernel says so (SC_AVPHYS_PAGES leaves it out)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Hand what was freed to the system: glibc keeps it for the next tensors of its size, in a heap for each thread that read one.
    Other C libraries have no such call, and need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def uncollected() -> Iterator[None]:
    """While it lasts, Python does not look for cycles of garbage: a tenth of the time of what makes many objects and keeps them."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
