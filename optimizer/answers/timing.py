"""How long one model takes for a prompt and for what follows it, in a process of its own: its memory is then its peak alone."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError, UserError

WARM_UP = 3  # decode steps, fixed by what allocators and caches of kernels need to settle
FIRST_CONTEXT = 4096  # fixed by what a small CPU prefills within a minute


@dataclass(frozen=True)
class Run:
    """What is timed: a prompt of `context` random tokens in each of `batch` sequences, then `tokens` decode steps. runtime: None for
    the model's own. context: None for FIRST_CONTEXT, or as much as the model takes. dtype: of a checkpoint, None: float32."""

    model: str
    batch: int
    context: int | None
    tokens: int
    runtime: str | None = None
    device: str = "cpu"
    dtype: str | None = None


def timed_apart(run: Run) -> dict[str, Any]:
    """`timed`, in a new process, which ends with this one. Raises UserError, also where that process is killed."""
    ours, theirs = os.pipe()
    command = [sys.executable, "-P", "-m", __spec__.name, str(theirs), json.dumps(asdict(run))]
    # Its stdin stays open as long as this process lives; a session of its own, or Ctrl-C would interrupt it, too.
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(theirs,), start_new_session=True
    )
    try:
        os.close(theirs)
        with open(ours, "rb") as answer:
            told = answer.read()
        child.wait()
    finally:
        child.kill()
        child.wait()
        if child.stdin is not None:
            child.stdin.close()
    if not told:
        why = " (killed, most likely for memory)" if child.returncode == -signal.SIGKILL else ""
        raise UserError(
            f"{run.model}: the process that timed it ended with exit code {child.returncode}{why}; give a smaller --context or --batch"
        )
    found: dict[str, Any] = json.loads(told)
    if (raised := found.get("raised")) is not None:
        raise _KINDS[raised](found["said"])
    return found


_KINDS: Mapping[str, type[Exception]] = {"usage": UsageError, "user": UserError, "other": RuntimeError}


def main(answer: int, run: Run) -> None:
    """In the new process. answer: a file descriptor."""
    threading.Thread(target=_end_with_the_other, daemon=True).start()
    try:
        told = timed(run)
    except UserError as error:
        told = {"raised": "usage" if isinstance(error, UsageError) else "user", "said": str(error)}
    except OSError as error:
        told = {"raised": "user", "said": f"{error.filename or run.model}: {error.strerror or error}"}
    except Exception as error:
        if os.environ.get("MLA2DSA_DEBUG") == "1":
            raise
        told = {"raised": "other", "said": f"{type(error).__name__}: {error}"}
        if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "allocate memory" in str(error):
            told = {"raised": "user", "said": f"{run.model}: out of memory; give a smaller --context or --batch"}
    os.write(answer, json.dumps(told).encode())  # far below what a pipe holds, so in one go
    os.close(answer)


def _end_with_the_other() -> None:
    os.read(0, 1)  # not by sys.stdin: its lock, which we would hold when this process ends, makes Python abort
    os._exit(1)


def timed(run: Run) -> dict[str, Any]:
    """Plain data. Raises UserError for a model that cannot be opened, or does not take so many tokens."""
    from .opened import open_session

    session, vocabulary, kind = open_session(run.model, run.runtime, run.device, run.batch, run.dtype)
    beside = run.tokens + WARM_UP
    context = run.context or max(1, min(FIRST_CONTEXT, session.capacity - beside))
    if context + beside > session.capacity:
        raise UserError(f"{run.model}: {context} + {beside} tokens exceed the {session.capacity} that it takes")
    found = measure(session, vocabulary, context, run.tokens)
    return {**kind, **found, "peak_memory": peak_memory(), **_machine(run)}


def measure(session: Any, vocab_size: int, context: int, tokens: int) -> dict[str, Any]:
    """Prefill, then decode. Before the clock runs one chunk of a prefill warms up: its slots are written again."""
    import torch

    from ...runtime.generation import chunk_of, prefill

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocab_size, (session.batch, context), generator=generator).tolist()
    first = min(context, chunk_of(session))
    prefill(session, [prompt[:first] for prompt in prompts], first)
    started = time.perf_counter()
    prefill(session, prompts, context)
    filled = time.perf_counter() - started
    steps = sorted(_decode(session, context, tokens))
    rows = session.batch
    return {
        "batch": rows,
        "context": context,
        "prefill_seconds": filled,
        "prefill_tokens_per_second": rows * context / filled,
        "decode_tokens_per_second": rows * tokens / sum(steps),
        "decode_ms": {
            name: 1000 * steps[int(part * (tokens - 1))] for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
        },
    }


def _decode(session: Any, context: int, tokens: int) -> list[float]:
    """Seconds of each step, the first few left out."""
    import torch

    rows = session.batch
    ids, zeros = torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    seconds = []
    for number in range(WARM_UP + tokens):
        at = torch.full((rows, 1), context + number)
        started = time.perf_counter()
        session.step(ids, at, at, zeros, zeros)
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


def peak_memory() -> int:
    """Most bytes that this process has had in memory. Linux' own figure where there is one: the other begins with its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _machine(run: Run) -> Mapping[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cpus": os.cpu_count(),
        "device": run.device,
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), Run(**json.loads(sys.argv[2])))
