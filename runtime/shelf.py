"""Tensors that nobody needs for a while: in memory up to a budget, beyond it in files of a private folder.

Streaming keeps a few tensors of every sequence while the others are run. Those that went to a file come back as a memory
map, so that only what is read of them takes memory, and only while it is used.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from ..files.temporary import scratch_folder
from ..files.writing import write_new

# benchmarks/memory.py: files take no time that can be measured beside the model's, so the budget is what a small machine spares.
BUDGET = 2**30  # bytes of one shelf in memory


class Shelf:
    """folder: exists, private to the shelf, and outlives it. budget: bytes in memory."""

    def __init__(self, folder: Path, budget: int = BUDGET) -> None:
        self._folder, self._budget = folder, budget
        self._count = self._held = 0

    def put(self, tensor: Tensor) -> Kept:
        """`tensor`, which nobody writes to from here on. Its file goes with what is returned."""
        if tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes():
            tensor = tensor.clone()  # a part of something larger, which would stay with it
        size = tensor.untyped_storage().nbytes()
        if not size or self._held + size <= self._budget:
            self._held += size
            kept = Kept(tensor, None)
            weakref.finalize(kept, self._release, size)
            return kept
        file = self._folder / str(self._count)
        self._count += 1
        plain = tensor.detach().cpu().contiguous()
        write_new(file, memoryview(plain.flatten().view(torch.uint8).numpy()))
        kept = Kept(tensor.new_empty(0), file, tuple(tensor.shape))
        weakref.finalize(kept, _remove, file)
        return kept

    def _release(self, size: int) -> None:
        self._held -= size


class Kept:
    """A tensor on a shelf. like: the tensor itself, or one of its dtype and device when it is in `file`."""

    def __init__(self, like: Tensor, file: Path | None, shape: tuple[int, ...] = ()) -> None:
        self._like, self._file, self._shape = like, file, shape

    def get(self) -> Tensor:
        """The tensor; from a file contiguous, and mapped anew, so that it takes memory for as long as the caller has it."""
        if self._file is None:
            return self._like
        count = torch.Size(self._shape).numel()
        mapped = torch.from_file(str(self._file), shared=False, size=count, dtype=self._like.dtype)
        return mapped.view(self._shape).to(self._like.device)


@contextmanager
def temporary_shelf() -> Iterator[Shelf]:
    """A shelf whose files are where the system keeps temporary ones, until the block ends."""
    with scratch_folder("shelf") as folder:
        yield Shelf(folder)


def _remove(file: Path) -> None:
    with suppress(OSError):  # the folder may be gone by now
        os.unlink(file)
