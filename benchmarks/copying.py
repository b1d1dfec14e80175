"""How fast a conversion copies weights, beside `cp`: `files.writing.place_file` onto another file system, and where nothing can be shared.

    python benchmarks/copying.py /dev/shm --mib 1024      # a folder on the file system to copy to

Both take turns, each onto a new file; printed are the medians and their ratio, cp's time in ours: 1 is as fast as cp, more is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mla2dsa.files import writing


def timed(copy: Callable[[Path, Path], object], source: Path, target: Path) -> float:
    start = time.perf_counter()
    copy(source, target)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--reflink=never", source, target], check=True)


def ours(source: Path, target: Path) -> None:
    how = writing.place_file(source, target, link=False)
    if how != "copy":
        raise SystemExit(
            f"{target.parent} shares blocks with {source.parent} ({how}): choose a folder on another file system"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory(dir=args.folder) as there:
        source, target = Path(here, "weights.safetensors"), Path(there, "weights.safetensors")
        with source.open("wb") as stream:
            for _ in range(args.mib):
                stream.write(os.urandom(2**20))
        timed(cp, source, target)  # the source is in the page cache from here on
        rounds = [(timed(cp, source, target), timed(ours, source, target)) for _ in range(args.runs)]
    theirs, own = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"{args.mib} MiB: cp {theirs:.2f} s, place_file {own:.2f} s, cp / place_file {theirs / own:.2f}")


if __name__ == "__main__":
    main()
