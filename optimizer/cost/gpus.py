"""What GPUs can do at most, and which share of it kernels reach: read from gpus.json, where each figure has its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import UsageError

DATA = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU: FLOP/s, bytes/s, bytes. fp8 is the rate of bf16 where there is no FP8."""

    key: str
    name: str
    bf16: float
    fp8: float
    bandwidth: float
    memory: float
    has_fp8: bool
    source: str


@dataclass(frozen=True)
class Reached:
    """Which share of the peak kernels reach (by name), seconds of a selection per query and layer, and what one step of
    speculative decoding takes and gives."""

    shares: Mapping[str, float]
    selection: float
    queries: float
    tokens: float


@cache
def data() -> dict[str, Any]:
    """gpus.json."""
    found: dict[str, Any] = json.loads(DATA.read_text())
    return found


def gpu_names() -> tuple[str, ...]:
    return tuple(data()["gpus"])


def gpu_of(key: str) -> Gpu:
    """Raises UsageError for one that gpus.json does not have."""
    if key not in data()["gpus"]:
        raise UsageError(f"--gpu {key}: expected one of {', '.join(gpu_names())}")
    one = data()["gpus"][key]
    return Gpu(
        key, one["name"], one["bf16"], one["fp8"] or one["bf16"], one["bandwidth"], one["memory"], one["fp8"] is not None,
        one["source"],
    )  # fmt: skip


def reached_on(gpu: Gpu) -> Reached:
    """Shares are taken to be those of the GPU they were measured on; the selection waits for memory and is scaled by it."""
    found = data()
    selection, speculation = found["selection"], found["speculation"]
    slower = found["gpus"][selection["gpu"]]["bandwidth"] / gpu.bandwidth
    shares = {name: float(share["value"]) for name, share in found["shares"].items()}
    return Reached(shares, selection["seconds"] * slower, speculation["queries"], speculation["tokens"])
