"""How long a newcomer waits: from a clone to a first sentence, to a report, and to two models side by side on a page.

    python benchmarks/newcomer.py            # clones this repository into a temporary folder, with an environment of its own
    python benchmarks/newcomer.py --clone https://...

README's commands as they stand; each line is the seconds since the clone began. How fast packages come is the index's affair.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

SENTENCE = ("generate", "examples/tiny-mla", "def main():", "--max-new-tokens", "16")
PAIR = ("examples/tiny-mla", "demo-out/tiny-dsa")


class Watch:
    """Tells what has been reached, and after how many seconds."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def tell(self, what: str) -> None:
        print(f"{time.monotonic() - self._start:7.0f} s  {what}", flush=True)


def run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, env=clean(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def clean() -> dict[str, str]:
    """The environment without what would lend packages of ours."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def tell_when_there(watch: Watch, file: Path) -> None:
    while not file.exists():
        time.sleep(0.2)
    watch.tell(f"the report: make demo has written {file.name}, and goes on to verify")


def answers_of_both(folder: Path) -> None:
    """`serve`, until its page is there and each of the two models has continued a text."""
    command = [str(folder / ".venv/bin/mla2dsa"), "serve", *PAIR, "--port", "0"]
    with subprocess.Popen(command, cwd=folder, env=clean(), stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            (url,) = re.findall(r"http://[\d.]+:\d+", server.stderr.readline())
            with urllib.request.urlopen(url) as page:
                assert b"Two models side by side" in page.read()
            for model in PAIR:
                asked = {"model": Path(model).name, "prompt": "def main():", "max_tokens": 16}
                request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode())
                request.add_header("Content-Type", "application/json")
                with urllib.request.urlopen(request) as answer:
                    assert json.load(answer)["choices"][0]["text"]
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", default=str(Path(__file__).resolve().parents[1]), metavar="FROM")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as place:
        folder, watch = Path(place, "mla2dsa"), Watch()
        run(Path(place), "git", "clone", "--quiet", args.clone, str(folder))
        run(folder, "make", "install", f"PYTHON={sys.executable}")
        watch.tell("make install")
        run(folder, str(folder / ".venv/bin/mla2dsa"), *SENTENCE)
        watch.tell("a sentence: mla2dsa generate")
        report = folder / PAIR[1] / "report.html"
        threading.Thread(target=tell_when_there, args=(watch, report), daemon=True).start()
        run(folder, "make", "demo")
        watch.tell("make demo")
        answers_of_both(folder)
        watch.tell("the page: mla2dsa serve, and an answer of both models")


if __name__ == "__main__":
    main()
