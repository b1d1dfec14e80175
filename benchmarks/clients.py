"""Many clients at once at `mla2dsa serve`, for minutes: errors, answers that are not what one client alone gets, and memory.

    python benchmarks/clients.py MODEL [MODEL ...] [--clients 16] [--seconds 120]

Every client is OpenAI's own and asks one question after the other: of the models in turn, streamed and whole in turn, each prompt
answered greedily, so that there is one right answer to it: what the server said to the first client, alone, before the others came.
Memory is the server's resident set: after a quarter of the time, and at the end.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

MIB = 2**20
PROMPTS = [
    "def main():\n",
    "import os\n",
    "class Stack:\n    def push",
    "for key, value in",
    "try:\n    with open(",
    "# Sort a list",
]
TOKENS = 24


@dataclass
class Seen:
    """What all clients together have seen."""

    answers: Counter[str] = field(default_factory=Counter)  # by model
    faults: list[str] = field(default_factory=list)


@contextmanager
def serving(models: list[str]) -> Iterator[tuple[str, int]]:
    """(URL, process id) of a server of its own, ready."""
    command = [sys.executable, "-m", "mla2dsa", "serve", *models, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        words = next(line for line in process.stderr if "http://" in line).split()
        yield next(word for word in words if word.startswith("http://")).rstrip("/,;"), process.pid
    finally:
        process.terminate()
        process.wait(60)


def resident(pid: int) -> float:
    """MiB in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / MIB


def ask(client: OpenAI, model: str, prompt: str, stream: bool) -> str:
    options: Any = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    if not stream:
        return client.completions.create(**options).choices[0].text
    return "".join(
        chunk.choices[0].text for chunk in client.completions.create(stream=True, **options) if chunk.choices
    )


def one_client(number: int, url: str, right: dict[tuple[str, str], str], until: float, seen: Seen) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    questions = list(right)
    for turn in itertools.count(number):
        model, prompt = questions[turn % len(questions)]
        try:
            said = ask(client, model, prompt, stream=turn % 2 == 0)
        except Exception as error:
            seen.faults.append(f"{type(error).__name__}: {error}")
            return
        if said != right[model, prompt]:
            seen.faults.append(f"{model}, {prompt!r}: {said!r} is not {right[model, prompt]!r}")
        seen.answers[model] += 1
        if time.monotonic() > until:
            return


def run(url: str, pid: int, clients: int, seconds: float) -> int:
    first = OpenAI(base_url=f"{url}/v1", api_key="none")
    names = [model.id for model in first.models.list()]
    right = {(name, prompt): ask(first, name, prompt, stream=False) for prompt in PROMPTS for name in names}
    seen, started = Seen(), time.monotonic()
    given = (url, right, started + seconds, seen)
    threads = [threading.Thread(target=one_client, args=(number, *given)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 4)
    before = resident(pid)
    for thread in threads:
        thread.join()
    after = resident(pid)
    done = ", ".join(f"{count} by {name}" for name, count in sorted(seen.answers.items()))
    print(
        f"{clients} clients, {time.monotonic() - started:.0f} s: {done} answers of {TOKENS} tokens, {len(seen.faults)} faults"
    )
    print(f"resident: {before:.1f} MiB after a quarter of it, {after:.1f} MiB at the end")
    for fault in seen.faults[:5]:
        print(f"  {fault}")
    return bool(seen.faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    with serving(options.models) as (url, pid):
        return run(url, pid, options.clients, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
