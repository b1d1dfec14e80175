"""bench: how fast an engine is, prefill and decode, on the GPU at hand. Results are plain data, as --json prints them."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..errors import UsageError, UserError
from ..files.manifests.engine_manifest import engine_folder, read_engine
from ..runtime.generation import Session, prefill
from ..runtime.tensorrt_session import open_engine_session

_WARM_UP = 3


def bench(target: str, batch: int = 1, context: int | None = None, tokens: int = 64) -> dict[str, Any]:
    """Seconds of prefill of `context` random tokens, and the time of each of `tokens` decode steps after it.

    Raises UserError where there is no GPU or the engine does not take these sizes, UsageError for sizes below 1.
    """
    folder = engine_folder(target)
    if folder is None:
        raise UserError(f"{target}: no engine folder; run `mla2dsa build` first")
    if min(batch, tokens, context or 1) < 1:
        raise UsageError("--batch, --context and --tokens: expected 1 or more")
    manifest = read_engine(folder)
    session = open_engine_session(folder, batch)
    context = max(1, session.capacity // 2) if context is None else context
    if context + tokens + _WARM_UP > session.capacity:
        raise UserError(f"{context} + {tokens + _WARM_UP} tokens exceed the engine's caches of {session.capacity}")
    found = measure(session, int(manifest["model"]["vocab_size"]), context, tokens)
    machine = {"gpu": torch.cuda.get_device_name(), "tensorrt": manifest["backend"], "torch": torch.__version__}
    return {"engine": str(folder), **found, **machine}


def measure(session: Session, vocab_size: int, context: int, tokens: int) -> dict[str, Any]:
    """Prefill once to warm up and once timed, then decode; the second prefill writes the same slots again."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocab_size, (session.batch, context), generator=generator).tolist()
    prefill(session, prompts, context)
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


def _decode(session: Session, context: int, tokens: int) -> list[float]:
    """Seconds of each step, the first few left out."""
    rows = session.batch
    ids, zeros = torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    seconds = []
    for number in range(_WARM_UP + tokens):
        at = torch.full((rows, 1), context + number)
        started = time.perf_counter()
        session.step(ids, at, at, zeros, zeros)
        seconds.append(time.perf_counter() - started)
    return seconds[_WARM_UP:]
