"""On a machine with an NVIDIA GPU: what the plugin's enqueue costs beside Triton's own launches of the same kernels.

    python benchmarks/plugin.py                     every op at decode and prefill shapes

Both run the same binaries' kernels on the same tensors; times are of the GPU (CUDA events) and of the host (how long a call takes
to return), medians of --repeat runs in turns. A ratio near 1 says that the plugin adds nothing. Has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

SHAPES = ((1, 1, 8192), (1, 1, 131072), (8, 1, 32768), (1, 512, 32768))


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds on the GPU, and of the host until the call is back."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    started = time.perf_counter()
    run()
    host = 1000 * (time.perf_counter() - started)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)), host


def measure(name: str, shape: tuple[int, int, int], repeat: int) -> dict[str, Any]:
    from plugin_running import Running, sm
    from plugin_samples import attention, cache_write_of, indexer, tensors

    from mla2dsa.kernels.gpu.launch import Launcher

    op = {
        "LightningIndexer": indexer(64, 128, 2048, sms=(sm(),)),
        "SparseMLA": attention(128, 512, 64, sms=(sm(),)),
        "CacheWrite": cache_write_of(576, (sm(),)),
    }[name]
    inputs = [tensor.zero_().cuda() for tensor in tensors(op, *shape)]
    if name == "LightningIndexer":
        inputs[-1] += shape[2]  # every key is in range
    units = torch.cuda.get_device_properties(0).multi_processor_count
    shapes = [tuple(tensor.shape) for tensor in inputs]
    form = next(it for it in op.forms if it.guard.value(shapes, {"units": units}) > 0)
    triton, plugin = Launcher(form.program), Running(op, inputs)
    for _ in range(3):
        triton(*inputs)
        plugin.once()
    pairs = [(timed(lambda: triton(*inputs)), timed(plugin.once)) for _ in range(repeat)]
    gpu, host = ([statistics.median(pair[who][what] for pair in pairs) for who in (0, 1)] for what in (0, 1))
    return {
        "op": name, "form": form.name, "batch": shape[0], "queries": shape[1], "slots": shape[2],
        "triton_gpu_ms": gpu[0], "plugin_gpu_ms": gpu[1], "gpu_ratio": gpu[1] / gpu[0],
        "triton_host_ms": host[0], "plugin_host_ms": host[1], "host_ratio": host[1] / host[0],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/plugin.py: needs an NVIDIA GPU, and torch sees none here", file=sys.stderr)
        return 1
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))
    for name in ("LightningIndexer", "SparseMLA", "CacheWrite"):
        for shape in SHAPES:
            print(json.dumps(measure(name, shape, args.repeat)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
