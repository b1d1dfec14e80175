"""Lines of the package that tests ran, by room; exit code 1 where a room has too few.

python tests/helpers/coverage_by_room.py .coverage.json      what `make test` leaves
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Rooms whose code runs on every machine. Kernels and runtimes need hardware that a machine may lack.
FLOORS = {"exporters": 92.0, "files": 92.0, "optimizer": 92.0, "passes": 92.0}
WORST = 5  # files named where a room is below its floor


@dataclass(frozen=True)
class Lines:
    """Lines of code, and how many of them no test ran."""

    all: int
    missed: int

    def __add__(self, other: Lines) -> Lines:
        return Lines(self.all + other.all, self.missed + other.missed)

    @property
    def percent(self) -> float:
        return 100.0 * (self.all - self.missed) / self.all if self.all else 100.0


def read_lines(file: Path) -> dict[str, Lines]:
    """By file of the package. Raises ValueError for what is not SlipCover's, or nothing was measured."""
    try:
        files = json.loads(file.read_text())["files"]
        found = {
            name: Lines(len(it["executed_lines"]) + len(it["missing_lines"]), len(it["missing_lines"]))
            for name, it in files.items()
        }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not what SlipCover writes ({error!r}): run `make test` first") from None
    missing = sorted(set(FLOORS) - {name.split("/")[0] for name in found})
    if missing:
        raise ValueError(
            f"{file}: no line of {', '.join(missing)} was measured: run the tests from the repository's root"
        )
    return found


def by_room(files: Mapping[str, Lines]) -> dict[str, Lines]:
    rooms: dict[str, Lines] = {}
    for file, lines in sorted(files.items()):
        room = file.split("/")[0]
        rooms[room] = rooms.get(room, Lines(0, 0)) + lines
    return rooms


def table(files: Mapping[str, Lines]) -> list[str]:
    rows = [f"{'room':12} {'lines':>7} {'missed':>7} {'covered':>8} {'at least':>9}"]
    rooms = by_room(files)
    for room, lines in [*rooms.items(), ("all", sum(rooms.values(), Lines(0, 0)))]:
        floor = f"{FLOORS[room]:.0f} %" if room in FLOORS else ""
        rows.append(f"{room:12} {lines.all:7} {lines.missed:7} {lines.percent:6.1f} % {floor:>9}".rstrip())
    return rows


def complaints(files: Mapping[str, Lines]) -> list[str]:
    """One line per room below its floor, with the files that miss most."""
    found = []
    for room, lines in by_room(files).items():
        if lines.percent < FLOORS.get(room, 0.0):
            mine = sorted((f for f in files if f.startswith(f"{room}/")), key=lambda f: -files[f].missed)
            worst = ", ".join(f"{f} {files[f].missed}" for f in mine[:WORST] if files[f].missed)
            found.append(
                f"{room}: {lines.percent:.1f} % of its lines are run by tests, expected {FLOORS[room]:.0f} %; missed: {worst}"
            )
    return found


def main() -> int:
    try:
        files = read_lines(Path(sys.argv[1]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(table(files)))
    wrong = complaints(files)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
