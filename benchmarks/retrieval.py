"""Needles in long texts of code, with examples/tiny-recall: what is found when 1/16 and 1/32 of the keys are attended to.

    python benchmarks/retrieval.py                       4096 and 8192 tokens, four prompts of each depth
    python benchmarks/retrieval.py --lengths 4096 --shares 16 --samples 1

The model is converted for every index_topk, calibrated on text of the standard library that it was trained on, and asked about numbers
hidden in files that it never saw. Beside DSA stand dense attention, the keys with the most dense attention (oracle) and a window
with sinks, all with the same number of keys. Text: loss on the held-out files, over positions with more keys than index_topk.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RECALL, MLA = ROOT / "examples" / "tiny-recall", ROOT / "examples" / "tiny-mla"
HELD_OUT = MLA / "held_out"
NAMES = ("dense", "dsa", "oracle", "window")


def converted(folder: Path, topk: int, indexer: str, calibration: Path) -> Path:
    out = folder / f"{indexer}-{topk}"
    if not out.exists():
        mla2dsa("convert", RECALL, out, "--index-topk", topk, "--indexer", indexer, "--calibration", calibration)
    return out


def mla2dsa(*arguments: object) -> str:
    run = [sys.executable, "-P", "-m", "mla2dsa", *map(str, arguments)]
    return subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout


def measured(dsa: Path, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Needles by depth, and the loss of one round of held-out text that is no longer than its files are."""
    flags = (
        "--long",
        "--style",
        "code",
        "--haystack",
        HELD_OUT,
        "--tasks",
        ",".join(options.tasks),
        "--lengths",
        length,
    )
    found = mla2dsa(
        "verify", RECALL, dsa, "--skip-transformers", "--text", HELD_OUT, "--sequences", 4, "--max-loss-delta", 1,
        *flags, "--samples", options.samples, "--seed", options.seed, "--json",
    )  # fmt: skip
    said: dict[str, Any] = json.loads(found)
    return said


def show(length: int, share: int, indexer: str, found: dict[str, Any]) -> None:
    text, scores = found["text"], found["long"]["scores"]
    loss = {name: text["by_selection"][name]["loss_delta"] for name in ("dsa", "oracle", "window")}
    costs = ", ".join(f"{name} {value:+.4f}" for name, value in loss.items())
    print(
        f"{length} tokens, index_topk {length // share} (1/{share}), {indexer}; loss at {text['length']} tokens: {costs} nats/token",
        flush=True,
    )
    for task, depth in dict.fromkeys((one["task"], one["depth"]) for one in scores):
        row = {one["variant"]: one for one in scores if (one["task"], one["depth"]) == (task, depth)}
        cells = "  ".join(f"{row[name]['accuracy']:6.1f} ({row[name]['logprob']:6.2f})" for name in NAMES)
        print(f"  {task:10} {depth!s:>4} %  {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--shares", type=int, nargs="+", default=[16, 32], help="one key in so many is attended to")
    parser.add_argument("--indexers", nargs="+", default=["auto"], help="as for convert --indexer")
    parser.add_argument("--tasks", nargs="+", default=["single"])
    parser.add_argument("--samples", type=int, default=4, help="prompts of each depth")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(
        f"{platform.machine()}, torch {torch.__version__}, {options.samples} prompts of each depth, seed {options.seed}"
    )
    print(f"found, % (log-probability of the answer, nats/token): {', '.join(NAMES)}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        calibration = Path(name) / "calibration.txt"
        corpus = [sys.executable, str(MLA / "corpus.py"), "--split", "train", "--max-bytes", "1000000", "--out"]
        subprocess.run([*corpus, str(calibration)], check=True, stdout=subprocess.DEVNULL)
        for length in options.lengths:
            for share in options.shares:
                for indexer in options.indexers:
                    dsa = converted(Path(name), length // share, indexer, calibration)
                    show(length, share, indexer, measured(dsa, length, options))


if __name__ == "__main__":
    main()
