"""Damaged files of every kind that mla2dsa reads: how many are refused in one line, how many are harmless, what falls.

python benchmarks/fuzz.py --count 400 --seed 7
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from fuzz_kinds import kinds, load_libraries, make
from fuzzing import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="damaged files of all kinds together (default 400)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--kind", action="append", help="only this one")
    args = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        load_libraries()
        chosen = kinds(make(place, engine=find_spec("tensorrt_rtx") is not None))
        if args.kind:
            chosen = {name: chosen[name] for name in args.kind}
        print(
            "| file | damaged | refused in one line | harmless | faults | slowest | most memory |\n|---|---|---|---|---|---|---|"
        )
        for number, (name, kind) in enumerate(chosen.items()):
            count = args.count // len(chosen) + (number < args.count % len(chosen))
            (place / "work").mkdir(exist_ok=True)
            found = fuzz(kind, count, args.seed, place / "work")
            wrong = [(fault, command) for fault, _, command in found if fault is not None]
            good = sum(ended.code == 0 for fault, ended, _ in found if fault is None)
            slowest, memory = max(it.seconds for _, it, _ in found), max(it.bytes for _, it, _ in found)
            row = (
                name,
                len(found),
                len(found) - good - len(wrong),
                good,
                len(wrong),
                f"{slowest:.1f} s",
                f"{memory / 1e9:.1f} GB",
            )
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            for fault, command in wrong:
                print(f"{name}: {shlex.join(command)}: {fault}", file=sys.stderr, flush=True)
            faults += len(wrong)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
