"""Memory that a program may still take."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

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


class Promised:
    """Weights that a session will load, each when it is first asked for: what of them is not there yet is nobody else's memory. Counts
    as long as somebody holds it, as the loader that `counted` gives does."""

    def __init__(self, size: int, device: str) -> None:
        self.left, self.device = size, device
        _PROMISED.add(self)

    def counted(self, load: Callable[[str], Any]) -> Callable[[str], Any]:
        """`load`, which gives a tensor that is not asked for again."""

        def loaded(name: str) -> Any:
            tensor = load(name)
            self.left = max(0, self.left - tensor.nbytes)
            return tensor

        return loaded


_PROMISED: WeakSet[Promised] = WeakSet()


def weights_that_fit(
    folder: Path, weights: Mapping[str, Any], tied: Mapping[str, str], dtype: Any, device: str, advice: str = ""
) -> Promised:
    """Of a session, which holds all of them. weights: tensors by name, in their shapes; tied: those that are another of them; dtype:
    torch's; advice: what to do beside finding another machine. Raises UserError where they take more than is free on the device, other
    sessions' aside."""
    import torch

    own = [tensor for name, tensor in weights.items() if tied.get(name) not in weights]
    needed = dtype.itemsize * sum(math.prod(tensor.shape) for tensor in own)
    free = free_memory() if torch.device(device).type == "cpu" else torch.cuda.mem_get_info(device)[0]
    free = max(0, free - sum(other.left for other in _PROMISED if other.device == device))
    if needed > free:
        raise UserError(
            f"{folder}: the weights take {_told(needed)} in {str(dtype).removeprefix('torch.')}, {_told(free)} are free "
            f"on {device}, and a session holds all of them: {advice}use a machine with more memory"
        )
    return Promised(needed, device)


def _told(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:.1f} MiB"


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
