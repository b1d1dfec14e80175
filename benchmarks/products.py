"""A linear layer in half precision on this CPU: as torch does it, and widened to float32 part by part (kernels/products.py).

python benchmarks/products.py
python benchmarks/products.py --dtype float16 --shape 7168 2048 --threads 2
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mla2dsa.kernels import products

ROWS = (1, 2, 4, 8, 16, 64, 512)
PARTS = (18, 20, 22)  # powers of two: numbers of the weight that are float32 at once
HEADS, NOPE, RANK = 16, 128, 512  # of DeepSeek-V2-Lite: what absorbs the queries


def fastest(run: Callable[[], Tensor], repeats: int) -> float:
    """Milliseconds of the best of `repeats`, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def widened(run: Callable[[], Tensor], part: int, repeats: int) -> float:
    """Whatever the processor has, and for however few rows."""
    kept = products.PART, products.FEW_ROWS, products._slow
    products.PART, products.FEW_ROWS, products._slow = 2**part, 0, lambda dtype: True  # type: ignore[assignment]
    try:
        return fastest(run, repeats)
    finally:
        products.PART, products.FEW_ROWS, products._slow = kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--shape", type=int, nargs=2, default=[2048, 2048], metavar=("OUT", "IN"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    served = "widened" if products.slow(torch.empty(0, dtype=dtype)) else "left to torch"
    print(
        f"{platform.machine()}, threads {args.threads}, torch {torch.__version__}, {args.dtype}: {served} here; milliseconds"
    )
    print(f"{'':10} {'rows':>5} {'torch':>9}" + "".join(f"{'2^' + str(part):>9}" for part in PARTS))
    weight = torch.randn(*args.shape).to(dtype)
    up = torch.randn(HEADS, NOPE, RANK).to(dtype)
    for rows in ROWS:
        x, q = torch.randn(rows, args.shape[1]).to(dtype), torch.randn(1, HEADS, rows, NOPE).to(dtype)
        cases: tuple[tuple[str, Callable[[], Tensor], Callable[[], Tensor]], ...] = (
            ("linear", lambda x=x: F.linear(x, weight), lambda x=x: products.linear(x, weight)),  # type: ignore[misc]
            ("absorb", lambda q=q: torch.matmul(q, up), lambda q=q: products.matmul(q, up)),  # type: ignore[misc]
        )
        for name, native, ours in cases:
            found = [fastest(native, args.repeats), *(widened(ours, part, args.repeats) for part in PARTS)]
            print(f"{name:10} {rows:5d}" + "".join(f"{ms:9.2f}" for ms in found), flush=True)


if __name__ == "__main__":
    main()
