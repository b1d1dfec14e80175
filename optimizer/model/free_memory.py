"""Memory that a program may still take."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import UserError


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


def check_weights_fit(folder: Path, shapes: Iterable[Sequence[int]], dtype: Any, device: str, advice: str = "") -> None:
    """Of a session, which holds all of them. shapes: of the weights; dtype: torch's; advice: what to do beside finding another machine.
    Raises UserError where they take more than is free on the device."""
    import torch

    needed = dtype.itemsize * sum(map(math.prod, shapes))
    free = free_memory() if torch.device(device).type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise UserError(
            f"{folder}: the weights take {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, {free / 2**30:.1f} GiB are free "
            f"on {device}, and a session holds all of them: {advice}use a machine with more memory"
        )


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
