"""How many layers of the examples can share an indexer, and what that costs in loss: `convert --share auto` with several limits.

    python benchmarks/sharing.py [--indexer closed-form] [--limits 0.005 0.05 1]

Both examples have four layers, so that there are at most three to share. A line for every set of layers that was tried: nats/token on
held-out text more than with an indexer in every layer, and then what the verification measured of the result.
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
TOPK = {"tiny-mla": 64, "tiny-recall": 256}


def convert(example: str, text: Path, indexer: str, limit: float, scratch: Path) -> dict[str, Any]:
    """The report of one conversion, whose verification may fail: what sharing costs is what is looked at."""
    recipe = scratch / "recipe.yaml"
    fields = {
        "index_topk": TOPK[example],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--indexer", default="closed-form")
    parser.add_argument("--limits", type=float, nargs="+", default=[0.005, 0.2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        text = scratch / "text.txt"
        corpus = [
            sys.executable,
            EXAMPLES / "tiny-mla" / "corpus.py",
            "--split",
            "train",
            "--max-bytes",
            "1000000",
            "--out",
            text,
        ]
        subprocess.run(corpus, check=True, capture_output=True)
        for example in TOPK:
            for limit in options.limits:
                report = convert(example, text, options.indexer, limit, scratch)
                found, proved = report["sharing"], report["verification"]["text"]["by_selection"]["dsa"]
                tried = ", ".join(f"{one['layers']} layers {one['loss']:+.4f}" for one in found["tried"])
                print(
                    f"{example}, {options.indexer}, top-k {TOPK[example]}, at most {limit:g}: layers {found['shared']} of "
                    f"{found['layers']} share, {found['loss']:+.4f} nats/token (tried {tried}); verified: loss "
                    f"{proved['loss_delta']:+.4f}, KL {proved['kl']:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
