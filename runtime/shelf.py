"""Tensors that nobody needs for a while: in memory up to a budget, beyond it in a file that has no name; on no other device.

Streaming keeps a few tensors of every sequence while the others are run. Those that went to the file come back as a memory
map, so that only what is read of them takes memory, and only while it is used. The file is nobody's but this process's, and
the system takes it back however the process ends.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from ..files.temporary import nameless_file

# benchmarks/memory.py: files take no time that can be measured beside the model's, so the budget is what a small machine spares.
BUDGET = 2**30  # bytes of one shelf in memory


class Shelf:
    """place: a folder on the file system that gets what is beyond `budget` bytes (None: where temporary files go)."""

    def __init__(self, place: Path | None = None, budget: int = BUDGET) -> None:
        self._held, self._budget = 0, budget
        self._place = place or Path(tempfile.gettempdir())
        self._room: _Room | None = None

    @property
    def in_file(self) -> int:
        """Bytes that the file has room for."""
        return 0 if self._room is None else self._room.end

    def put(self, tensor: Tensor) -> Kept:
        """`tensor`, which nobody writes to from here on. Its room is free again once what is returned, and what came of it, is
        gone. Raises OSError where the file system is full."""
        device, tensor = tensor.device, tensor.detach().cpu()
        if tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes():
            tensor = tensor.clone()  # a part of something larger, which would stay with it
        size = tensor.untyped_storage().nbytes()
        if not size or self._held + size <= self._budget:
            self._held += size
            kept = Kept(tensor, device)
            weakref.finalize(kept, self._release, size)
            return kept
        if self._room is None:
            self._room = _Room(self._place)
        part = self._room.put(tensor.contiguous().flatten().view(torch.uint8))
        return Kept(tensor.new_empty(0), device, part, tensor.shape)

    def _release(self, size: int) -> None:
        self._held -= size


class Kept:
    """A tensor on a shelf. like: the tensor itself, or one of its dtype when it is in the file; device: where it comes from."""

    def __init__(
        self, like: Tensor, device: torch.device, part: _Part | None = None, shape: torch.Size | None = None
    ) -> None:
        self._like, self._part = like, part
        self.shape, self.dtype, self.device = tuple(like.shape if shape is None else shape), like.dtype, device

    def get(self) -> Tensor:
        """The tensor, back where it comes from. From the file it is contiguous, and mapped anew, so that it takes memory for as
        long as the caller has it."""
        if self._part is None:
            return self._like.to(self.device)
        found = torch.frombuffer(_Map(self._part), dtype=self.dtype, count=torch.Size(self.shape).numel())
        return found.view(self.shape).to(self.device)


class _Room:
    """One file without a name, whose parts are given out and taken back."""

    def __init__(self, place: Path) -> None:
        self.file, self.end = nameless_file(place), 0
        self._free: dict[int, list[int]] = {}  # offsets by size: what is streamed comes in a few sizes

    def put(self, content: Tensor) -> _Part:
        size = -(-content.numel() // mmap.PAGESIZE) * mmap.PAGESIZE  # a map begins at a page
        offsets = self._free.setdefault(size, [])
        offset = offsets.pop() if offsets else self._grown(size)
        self.file.seek(offset)
        self.file.write(content.numpy().data)
        self.file.flush()
        part = _Part(self, offset, size)
        weakref.finalize(part, offsets.append, offset)
        return part

    def _grown(self, size: int) -> int:
        offset, self.end = self.end, self.end + size
        self.file.truncate(self.end)
        return offset


class _Part:
    def __init__(self, room: _Room, offset: int, size: int) -> None:
        self.room, self.offset, self.size = room, offset, size


class _Map(mmap.mmap):
    """Private: writing to it changes no file. The part is taken for as long as the map is there."""

    part: _Part

    def __new__(cls, part: _Part) -> _Map:
        made = super().__new__(cls, part.room.file.fileno(), part.size, access=mmap.ACCESS_COPY, offset=part.offset)
        made.part = part
        return made
