"""How many layers of the examples can share an indexer, and what that costs in loss: `convert --share auto` with several limits.

    python benchmarks/sharing.py [--indexer auto] [--limits 0.005 0.1] [--example tiny-recall]

Both examples have four layers, so that there are at most three to share. A line for every limit: the sets of layers that were tried,
nats/token on held-out text more than with an indexer in every layer, and then what the verification measured of the result.
Committed: results/sharing.txt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {"tiny-mla": (64, 1024), "tiny-recall": (256, 4096)}  # index_topk, tokens of a sequence: a sixteenth of it


def convert(example: str, text: Path, indexer: str, limit: float, scratch: Path) -> dict[str, Any]:
    """The report of one conversion, whose verification may fail: what sharing costs is what is looked at."""
    recipe = scratch / "recipe.yaml"
    fields = {
        "index_topk": SIZES[example][0],
        "sequence_length": SIZES[example][1],
        "indexer": indexer,
        "calibration": str(text),
        "share": "auto",
        "share_loss": limit,
    }
    recipe.write_text(json.dumps(fields | {"verify": {"max_loss_delta": 10}}))
    command = [
        sys.executable,
        "-m",
        "mla2dsa",
        "convert",
        EXAMPLES / example,
        scratch / "out",
        "--recipe",
        recipe,
        "--overwrite",
    ]
    done = subprocess.run([*command, "--skip-transformers", "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def corpus(split: str, out: Path) -> Path:
    """A megabyte of the running Python's library at most, the part that tiny-mla was trained on or what was held out."""
    script = [
        sys.executable,
        EXAMPLES / "tiny-mla" / "corpus.py",
        "--split",
        split,
        "--max-bytes",
        "1000000",
        "--out",
        out,
    ]
    subprocess.run(script, check=True, capture_output=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--indexer", default="auto")
    parser.add_argument("--limits", type=float, nargs="+", default=[0.005, 0.1])
    parser.add_argument("--example", choices=SIZES, nargs="+", default=list(SIZES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        text = corpus("train", scratch / "text.txt")
        for example in options.example:
            for limit in options.limits:
                report = convert(example, text, options.indexer, limit, scratch)
                found, proved = report["sharing"], report["verification"]["text"]["by_selection"]["dsa"]
                tried = ", ".join(f"{one['layers']} layers {one['loss']:+.4f}" for one in found["tried"])
                print(
                    f"{example}, {options.indexer}, top-k {SIZES[example][0]} of {SIZES[example][1]} tokens, at most {limit:g}: layers "
                    f"{found['shared']} of "
                    f"{found['layers']} share, {found['loss']:+.4f} nats/token (tried {tried}); verified: loss "
                    f"{proved['loss_delta']:+.4f}, KL {proved['kl']:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
