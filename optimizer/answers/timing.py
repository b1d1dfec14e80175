"""How long one model takes for a prompt and for what follows it, in a process of its own: its memory is then its peak alone."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...errors import UserError

WARM_UP = 3  # decode steps, fixed by what allocators and caches of kernels need to settle
FIRST_CONTEXT = 4096  # fixed by what a small CPU prefills within a minute


@dataclass(frozen=True)
class Run:
    """What is timed: a prompt of `context` random tokens in each of `batch` sequences, then `tokens` decode steps. runtime: None for
    the model's own. context: None for FIRST_CONTEXT, or as much as the model takes."""

    model: str
    batch: int
    context: int | None
    tokens: int
    runtime: str | None = None
    device: str = "cpu"


def timed_apart(run: Run) -> dict[str, Any]:
    """`timed`, in a new process. Raises UserError, also where that process is killed."""
    import multiprocessing

    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe(duplex=False)
    child = spawning.Process(target=_child, args=(theirs, run), daemon=True)
    child.start()
    theirs.close()
    try:
        found, error = ours.recv()
    except EOFError:
        child.join()
        raise UserError(
            f"{run.model}: the process that ran {run.context or 'its'} tokens ended with exit code {child.exitcode} "
            "(-9: killed, most likely for memory); give a smaller --context or --batch"
        ) from None
    finally:
        child.terminate()
        child.join()
    if error is not None:
        raise error
    return dict(found)


def _child(answer: Connection, run: Run) -> None:
    try:
        answer.send((timed(run), None))
    except UserError as error:
        answer.send((None, UserError(str(error))))
    except Exception as error:
        answer.send((None, RuntimeError(f"{type(error).__name__}: {error}")))
        if os.environ.get("MLA2DSA_DEBUG") == "1":
            raise


def timed(run: Run) -> dict[str, Any]:
    """Plain data. Raises UserError for a model that cannot be opened, or does not take so many tokens."""
    from .opened import open_session

    session, vocabulary, runtime = open_session(run.model, run.runtime, run.device, run.batch)
    beside = run.tokens + WARM_UP
    context = run.context or max(1, min(FIRST_CONTEXT, session.capacity - beside))
    if context + beside > session.capacity:
        raise UserError(f"{run.model}: {context} + {beside} tokens exceed the {session.capacity} that it takes")
    found = measure(session, vocabulary, context, run.tokens)
    return {"runtime": runtime, **found, "peak_memory": peak_memory(), **_machine(run)}


def measure(session: Any, vocab_size: int, context: int, tokens: int) -> dict[str, Any]:
    """Prefill, then decode. Before the clock runs one chunk of a prefill warms up: its slots are written again."""
    import torch

    from ...files.sizes import PREFILL_CHUNK
    from ...runtime.generation import prefill

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocab_size, (session.batch, context), generator=generator).tolist()
    first = min(context, PREFILL_CHUNK)
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
