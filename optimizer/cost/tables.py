"""The cost of a model as data: by position, crossovers, caches, memory. What `plan --cost --json` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .gpus import data
from .roofline import Roofline, lengths_of

BATCHES = (1, 32, 128)


def cost_table(model: Roofline, context: int) -> dict[str, Any]:
    """Dollars per million tokens and bytes, dense and DSA, at lengths up to `context`."""
    lengths = lengths_of(context)
    return {
        "gpu": {"key": model.gpu.key, "name": model.gpu.name, "source": model.gpu.source},
        "dollars_per_gpu_hour": model.price, "batch": model.batch, "speculative": model.speculative,
        "active_parameters": model.shape.active, "weight_bytes": model.shape.weight_bytes,
        "dollars_per_million_tokens": [_at(model, length) for length in lengths],
        "crossover": {"prefill": model.crossover(model.prefill), "decode": model.crossover(model.decode)},
        "bytes_per_token": {"dense": model.cache_bytes(False), "dsa": model.cache_bytes(True), "index": model.index_bytes()},
        "memory": _memory(model, lengths),
        "assumed": {name: share for name, share in data().items() if name in ("shares", "selection", "speculation")},
    }  # fmt: skip


def _at(model: Roofline, length: int) -> dict[str, float]:
    row: dict[str, float] = {"position": length}
    for name, cost in (("prefill", model.prefill), ("decode", model.decode)):
        dense, sparse = (model.dollars(cost(length, sparse)) for sparse in (False, True))
        row |= {f"{name}_dense": dense, f"{name}_dsa": sparse, f"{name}_ratio": dense / sparse}
    return row


def _memory(model: Roofline, lengths: Sequence[int]) -> list[dict[str, float]]:
    """Bytes at batch times context, with the GPUs that hold them."""
    batches = (model.batch,) if model.batch else BATCHES
    rows = []
    for batch in batches:
        for context in lengths[-3:]:
            dense, sparse = (model.memory(batch, context, sparse) for sparse in (False, True))
            gpus = {
                f"gpus_{name}": -(-total // model.gpu.memory) for name, total in (("dense", dense), ("dsa", sparse))
            }
            rows.append({"batch": batch, "context": context, "dense": dense, "dsa": sparse, **gpus})
    return rows
