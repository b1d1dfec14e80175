"""The corpus of tiny-mla: CPython's own standard library, split by file into a training part and a held-out part.

As a script it writes one split of the running Python's library into a text file, every document led by `EOT`:

    python examples/tiny-mla/corpus.py --split train --out train.txt --max-bytes 1000000
"""

import argparse
import hashlib
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path

EOT = "<|endoftext|>"  # the tokenizer's only special token: in text form it becomes the id that training put there
SPLITS = ("train", "held-out")
SKIPPED = ("/test/", "/encodings/", "/site-packages/", "/__pycache__/", "/idlelib/idle_test/")
MIN_BYTES = 1000  # files up to this size are mostly re-exports


def stdlib() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(path: str) -> bool:
    """Whether the file at `path` (relative to the library, with forward slashes) is kept out of training.

    The rule looks at the path only, so it gives the same answer for every Python version: a held-out file of one
    version cannot have been in the training split of another.
    """
    return int(hashlib.sha1(path.encode()).hexdigest(), 16) % 16 == 0


def corpus_paths(lib: Path, split: str) -> list[str]:
    """Paths of one split ("train" or "held-out"), relative to `lib`, with forward slashes, sorted as strings."""
    paths = (file.relative_to(lib).as_posix() for file in lib.rglob("*.py") if file.stat().st_size > MIN_BYTES)
    kept = (path for path in paths if not any(part in f"/{path}" for part in SKIPPED))
    return sorted(path for path in kept if is_held_out(path) == (split == "held-out"))


def read_documents(lib: Path, split: str) -> list[str]:
    """The text of every file of one split, in the order of `corpus_paths`."""
    return [(lib / path).read_text(encoding="utf-8", errors="replace") for path in corpus_paths(lib, split)]


def join_documents(documents: Iterable[str], max_bytes: int | None = None) -> str:
    """Documents in one text, each led by `EOT`, as in training. The last one is cut where `max_bytes` is reached."""
    text = "".join(EOT + document for document in documents)
    return text if max_bytes is None else text.encode()[:max_bytes].decode(errors="ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the text file to write")
    parser.add_argument("--max-bytes", type=int, metavar="N", help="stop after N bytes (default: the whole split)")
    parser.add_argument("--seed", type=int, default=0, help="order of the documents (default: 0)")
    args = parser.parse_args()
    documents = read_documents(stdlib(), args.split)
    if not documents:
        parser.error(f"no .py files of the {args.split} split under {stdlib()}: this Python has no library sources")
    random.Random(args.seed).shuffle(documents)  # alphabetical order would begin with a few packages only
    text = join_documents(documents, args.max_bytes)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8", newline="\n")
    print(f"{args.out}: {len(text.encode())} bytes, {text.count(EOT)} of {len(documents)} {args.split} documents")


if __name__ == "__main__":
    main()
