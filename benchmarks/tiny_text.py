"""The trained example and the text it was trained on, for the benchmarks that fit indexers to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-mla"


def training_text(folder: str) -> Path:
    """tiny-mla's corpus of the running Python, without the held-out files, in `folder`."""
    out = Path(folder) / "train.txt"
    subprocess.run(
        [sys.executable, TINY / "corpus.py", "--split", "train", "--out", out], check=True, stdout=subprocess.DEVNULL
    )
    return out
