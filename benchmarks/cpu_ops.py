"""DSA (lightning_indexer + sparse_mla) beside dense attention for one MLA layer on this CPU, in one run.

    python benchmarks/cpu_ops.py                # decode at 8K and 32K, prefill at 2K to 8K, float32 and bfloat16
    python benchmarks/cpu_ops.py --full         # and prefill at 1K, 16K and 32K
    MLA2DSA_CPU=torch python benchmarks/cpu_ops.py  # without the C++, or with that of another path
    python benchmarks/cpu_ops.py --only decode  # seconds instead of minutes

Dense is what a model runs today: decode in absorbed form over the latent cache (torch matmul and softmax), prefill in
per-head form with causal scaled_dot_product_attention (values padded to the query width, which is faster). DSA prefill goes
through chunks as a torch session's does, each in the form that a session takes. Both count what makes of latents keys and values,
or absorbs the queries; no other projections, which both sides share but for the indexer's own. Beyond 8K tokens, dense is timed at
`--points` few queries spread over the sequence, DSA at as many chunks, and scaled to all of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mla2dsa.files.sizes import TORCH_CHUNK
from mla2dsa.kernels import native_ops, ops, products
from mla2dsa.runtime.tiled import expanded

HEADS, RANK, ROPE, NOPE, VALUE = 16, 512, 64, 128, 128  # DeepSeek-V2-Lite's attention
INDEX_HEADS, INDEX_DIM, TOPK = 8, 128, 2048
SCALE = (NOPE + ROPE) ** -0.5
WHOLE = 8192  # tokens: prompts up to here are timed whole
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds, for one token (decode) or the whole sequence (prefill)."""

    phase: str
    dtype: str
    length: int
    dense_ms: float
    indexer_ms: float
    sparse_ms: float

    @property
    def ratio(self) -> float:
        return self.dense_ms / (self.indexer_ms + self.sparse_ms)


def fastest(run: Callable[[], Tensor], repeats: int) -> float:
    """Milliseconds of the best of `repeats` calls, after one to warm up."""
    run()
    return min(timed(run) for _ in range(repeats))


def timed(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def dsa(queries: int, length: int, dtype: torch.dtype, repeats: int) -> tuple[float, float]:
    """Indexer and sparse attention for the last `queries` tokens of `length`."""
    k, kv = torch.randn(1, length, INDEX_DIM).to(dtype), torch.randn(1, length, RANK + ROPE).to(dtype)
    q, weights = torch.randn(1, queries, INDEX_HEADS, INDEX_DIM).to(dtype), torch.randn(1, queries, INDEX_HEADS)
    rows = torch.randn(1, queries, HEADS, RANK + ROPE).to(dtype)
    end = torch.arange(length - queries + 1, length + 1, dtype=torch.int32)[None]
    begin = torch.zeros_like(end)
    indices = ops.lightning_indexer(q, k, weights, begin, end, TOPK)
    return (
        fastest(lambda: ops.lightning_indexer(q, k, weights, begin, end, TOPK), repeats),
        fastest(lambda: ops.sparse_mla(rows, kv, indices, SCALE, RANK), repeats),
    )


def dsa_prefill(length: int, dtype: torch.dtype, points: int, repeats: int) -> tuple[float, float]:
    """Indexer and attention of a whole prompt, in chunks."""
    ends = range(min(TORCH_CHUNK, length), length + 1, TORCH_CHUNK)
    picked = ends if length <= WHOLE else [ends[(2 * i + 1) * len(ends) // (2 * points)] for i in range(points)]
    costs = [dsa_chunk(min(TORCH_CHUNK, length), upto, dtype, repeats) for upto in picked]
    indexer, attention = (sum(cost) * len(ends) / len(costs) for cost in zip(*costs, strict=True))
    return indexer, attention


def dsa_chunk(queries: int, length: int, dtype: torch.dtype, repeats: int) -> tuple[float, float]:
    """The last `queries` tokens of `length`: indexer; attention from the heads' queries to their values, as sessions run it."""
    k, kv = torch.randn(1, length, INDEX_DIM).to(dtype), torch.randn(1, length, RANK + ROPE).to(dtype)
    q, weights = torch.randn(1, queries, INDEX_HEADS, INDEX_DIM).to(dtype), torch.randn(1, queries, INDEX_HEADS)
    q_nope, q_rope = (torch.randn(1, HEADS, queries, width).to(dtype) for width in (NOPE, ROPE))
    up = (torch.randn(HEADS, NOPE + VALUE, RANK) * RANK**-0.5).to(dtype)
    key_up, value_up = up[:, :NOPE], up[:, NOPE:].mT
    end = torch.arange(length - queries + 1, length + 1, dtype=torch.int32)[None]
    begin = torch.zeros_like(end)
    indices = ops.lightning_indexer(q, k, weights, begin, end, TOPK)

    def attention() -> Tensor:
        return expanded.in_less_work(
            q_nope, q_rope, kv, indices, key_up, value_up, SCALE,
            lambda rows, selected: ops.sparse_mla(rows, kv, selected, SCALE, RANK),
        )  # fmt: skip

    return fastest(lambda: ops.lightning_indexer(q, k, weights, begin, end, TOPK), repeats), fastest(attention, repeats)


def dense_decode(length: int, dtype: torch.dtype, repeats: int) -> float:
    """One token over the latent cache: logits, softmax in float32, values."""
    q, kv = torch.randn(HEADS, RANK + ROPE).to(dtype), torch.randn(length, RANK + ROPE).to(dtype)

    def attended() -> Tensor:
        attention = (products.matmul(q, kv.T).float() * SCALE).softmax(-1).to(dtype)
        return products.matmul(attention, kv[:, :RANK])

    return fastest(attended, repeats)


def dense_prefill(length: int, dtype: torch.dtype, points: int, chunk: int, repeats: int) -> float:
    """A whole prompt, per-head form: keys and values of the latents, joined and filled up, then causal attention."""
    latent, up = torch.randn(length, RANK).to(dtype), torch.randn(HEADS * (NOPE + VALUE), RANK).to(dtype)
    k_rope, q_nope, q_rope = (
        torch.randn(length, ROPE).to(dtype),
        *(torch.randn(HEADS, length, d).to(dtype) for d in (NOPE, ROPE)),
    )

    def joined() -> Tensor:
        made = products.linear(latent, up).view(length, HEADS, NOPE + VALUE).transpose(0, 1)
        torch.cat([q_nope, q_rope], -1)
        F.pad(made[..., NOPE:], (0, NOPE + ROPE - VALUE))
        return torch.cat([made[..., :NOPE], k_rope.expand(HEADS, -1, -1)], -1)

    made = fastest(joined, repeats)
    if length > WHOLE:
        places = [(2 * i + 1) * length // (2 * points) for i in range(points)]
        return made + sum(dense_queries(chunk, upto, dtype, repeats) for upto in places) * length / chunk / points
    q, k = (torch.randn(1, HEADS, length, NOPE + ROPE).to(dtype) for _ in range(2))
    v = F.pad(torch.randn(1, HEADS, length, VALUE).to(dtype), (0, NOPE + ROPE - VALUE))
    return made + fastest(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE), repeats)


def dense_queries(queries: int, length: int, dtype: torch.dtype, repeats: int) -> float:
    """The last `queries` tokens of `length`: all keys before them, then causal among themselves."""
    q = torch.randn(1, HEADS, queries, NOPE + ROPE).to(dtype)
    k = torch.randn(1, HEADS, length, NOPE + ROPE).to(dtype)
    v = F.pad(torch.randn(1, HEADS, length, VALUE).to(dtype), (0, NOPE + ROPE - VALUE))
    mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    masked = fastest(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE), repeats)
    unmasked = fastest(lambda: F.scaled_dot_product_attention(q, k, v, scale=SCALE), repeats)
    return min(
        masked, unmasked
    )  # an explicit mask costs extra, a causal kernel would not: never count that against dense


def decode(length: int, name: str, repeats: int) -> Row:
    dense = dense_decode(length, DTYPES[name], repeats)
    return Row("decode", name, length, dense, *dsa(1, length, DTYPES[name], repeats))


def prefill(length: int, name: str, points: int, chunk: int, repeats: int) -> Row:
    dense = dense_prefill(length, DTYPES[name], points, chunk, repeats)
    return Row("prefill", name, length, dense, *dsa_prefill(length, DTYPES[name], points, repeats))


def measure(args: argparse.Namespace) -> Iterator[Row]:
    for name in args.dtype:
        if args.only != "prefill":
            yield from (decode(length, name, args.repeats * 5) for length in (8192, 32768))
        if args.only != "decode":
            lengths = (1024, 2048, 4096, 8192, 16384, 32768) if args.full else (2048, 4096, 8192)
            yield from (prefill(length, name, args.points, args.chunk, args.repeats) for length in lengths)


def machine() -> dict[str, str | int]:
    return {
        "cpu": cpu_model(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "C++": native_ops.summary(),
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="add prefill at 1K, 16K and 32K")
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--points", type=int, default=4, help="places of a long sequence where prefill is timed")
    parser.add_argument("--chunk", type=int, default=64, help="queries of dense attention timed at each")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.json:
        rows = [asdict(row) | {"ratio": row.ratio} for row in measure(args)]
        print(json.dumps({"machine": machine(), "rows": rows}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"{HEADS} heads, kv_lora_rank {RANK}, index heads {INDEX_HEADS} x {INDEX_DIM}, topk {TOPK}; milliseconds")
    print(f"{'phase':8} {'dtype':9} {'length':>6} {'dense':>10} {'indexer':>10} {'sparse':>10} {'dense / DSA':>12}")
    for row in measure(args):
        costs = f"{row.dense_ms:10.2f} {row.indexer_ms:10.2f} {row.sparse_ms:10.2f}"
        print(f"{row.phase:8} {row.dtype:9} {row.length:6d} {costs} {row.ratio:12.2f}", flush=True)


if __name__ == "__main__":
    main()
