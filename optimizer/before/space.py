"""Room on disks: what a run needs, on the file system that really gets the bytes, against what is free there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...files.staging import resolved
from ...files.temporary import private_folder
from ...files.writing import can_link

PROBE = ".mla2dsa-probe-"


@dataclass
class Needs:
    """Bytes by file system. A place need not exist: it is made on the disk of its nearest parent that does."""

    _wanted: list[tuple[Path, int, str]] = field(default_factory=list)

    def add(self, place: Path, nbytes: int, what: str) -> None:
        """`nbytes` more at `place`."""
        if nbytes:
            self._wanted.append((existing_parent(place), nbytes, what))

    def links(self, place: Path, files: Sequence[Path], what: str) -> None:
        """`files` beside one another at `place`: no room where they can be linked, their size where they have to be copied."""
        by_disk: dict[int, list[Path]] = {}
        for file in files:
            by_disk.setdefault(file.stat().st_dev, []).append(file)
        for alike in by_disk.values():
            try:
                with private_folder(existing_parent(place), PROBE) as folder:
                    free = can_link(alike[0], folder / "probe")
            except OSError:  # nothing can be written there at all, which `check_out` says
                return
            if not free:
                self.add(place, sum(file.stat().st_size for file in alike), what)

    def same_disk(self, one: Path, two: Path) -> bool:
        return existing_parent(one).stat().st_dev == existing_parent(two).stat().st_dev

    def faults(self) -> list[str]:
        """A line for each file system with too little room."""
        disks: dict[int, list[tuple[Path, int, str]]] = {}
        for entry in self._wanted:
            disks.setdefault(entry[0].stat().st_dev, []).append(entry)
        found = []
        for entries in disks.values():
            place, needed = entries[0][0], sum(nbytes for _, nbytes, _ in entries)
            free = shutil.disk_usage(place).free
            if needed > free:
                parts = ", ".join(f"{_text(nbytes)} {what}" for _, nbytes, what in entries)
                found.append(
                    f"{place}: {_text(needed)} are needed there ({parts}), {_text(free)} are free; free some or use another disk"
                )
        return found


def existing_parent(place: Path) -> Path:
    """`place`, or the nearest of its parents that is there; links followed."""
    real = resolved(place)
    return next(it for it in (real, *real.parents) if os.path.exists(it))  # pathlib's raises for a name too long


def _text(nbytes: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"
