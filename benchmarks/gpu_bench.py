"""What `gpu.py` measures with: the device and its ceilings, medians with a flushed cache, CUDA graphs, a table of rows."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RANK, ROPE, NOPE, VALUE, INDEX_DIM, TOPK = 512, 64, 128, 128, 128, 2048
SCALE = (NOPE + ROPE) ** -0.5
FP8 = torch.float8_e4m3fn
Run = Callable[[], object]


def find_package() -> None:
    """Make the repository this file lies in importable as `mla2dsa`, before any installed one."""
    place = tempfile.mkdtemp(prefix="mla2dsa-")
    os.symlink(Path(__file__).resolve().parents[1], Path(place, "mla2dsa"))
    sys.path.insert(0, place)
    atexit.register(shutil.rmtree, place)


class Bench:
    """The device, its ceilings, and what was found."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = "cpu" if tiny else "cuda"
        major, minor = (0, 0) if tiny else torch.cuda.get_device_capability()
        self.sm = 10 * major + minor
        self.fp8 = tiny or self.sm >= 89
        self.checks: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.bandwidth = self.flops = math.inf  # bytes and operations a second

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.tiny else real

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)

    def time(self, run: Run) -> float:
        """Median milliseconds."""
        if self.tiny:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        from triton.testing import do_bench

        return float(do_bench(run, warmup=20, rep=100, return_mode="median"))

    def graph(self, run: Run) -> float:
        """Median milliseconds of the run captured in a CUDA graph: what a serving loop pays, without Python."""
        if self.tiny:
            return self.time(run)
        run()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        return self.time(captured.replay)

    def measure_ceilings(self) -> None:
        n = self.size(8192, 64)
        a, b = self.randn(n, n), self.randn(n, n)
        self.flops = 2 * n**3 / (self.time(lambda: a @ b) * 1e-3)
        source = torch.empty(self.size(2**30, 2**16), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.numel() / (self.time(lambda: target.copy_(source)) * 1e-3)
        print(f"ceilings: copy {self.bandwidth / 1e12:.2f} TB/s, bfloat16 product {self.flops / 1e12:.0f} TFLOP/s")

    def check(self, name: str, value: float, limit: float) -> None:
        good = value <= limit
        self.checks.append({"check": name, "value": value, "limit": limit, "passed": good})
        print(f"{'ok  ' if good else 'FAIL'} {name:58} {value:9.2e}  limit {limit:.0e}", flush=True)

    def row(
        self, name: str, case: str, ms: float, flops: float = 0, moved: float = 0, fp8: bool = False, **other: float
    ) -> None:
        """flops: counted as bfloat16 would run, twice as fast if `fp8`; moved: bytes."""
        ideal = max(flops / (self.flops * (2 if fp8 else 1)), moved / self.bandwidth) * 1e3
        self.rows.append(
            {"op": name, "case": case, "ms": ms, "flops": flops, "bytes": moved, "of_ceiling": ideal / ms, **other}
        )
        extra = "".join(f"  {key.replace('_', ' ')} {value:.3f}" for key, value in other.items())
        rate = f"{flops / ms / 1e9:7.0f} TFLOP/s" if flops else " " * 15
        print(
            f"{name:24} {case:42} {ms:9.3f} ms {rate} {moved / ms / 1e9:6.2f} TB/s {ideal / ms:6.0%} of ceiling{extra}",
            flush=True,
        )


def relative_rms(got: Tensor, want: Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def causal(batch: int, queries: int, slots: int, device: str) -> tuple[Tensor, Tensor]:
    """Key ranges of the last `queries` of `slots` tokens."""
    end = torch.arange(slots - queries + 1, slots + 1, dtype=torch.int32, device=device).expand(batch, -1).contiguous()
    return torch.zeros_like(end), end


find_package()
