"""Memory that a program may still take."""

from __future__ import annotations

import os
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
