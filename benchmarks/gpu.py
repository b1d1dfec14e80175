"""Checks the GPU ops on the card that is there, then times them: one command, under ten minutes.

    python benchmarks/gpu.py                       # prints a table; exit code 1 if a check fails
    python benchmarks/gpu.py --json gpu.json       # and writes it
    python benchmarks/gpu.py --only sparse layer   # checks always run
    python benchmarks/gpu.py --tiny                # small shapes on the CPU, in Triton's interpreter: does this script work?

Needs torch (2.11 or newer) and the triton that comes with it, nothing else: the package need not be installed, the script finds
the repository it lies in.

First two ceilings of this very card are measured, a large copy (bytes read and written) and a large bfloat16 product. The
column "of ceiling" is the time that the op's arithmetic or its memory traffic, whichever is more, would take at those rates, over
the time measured. Times are medians, with the L2 cache flushed before each run; "graph" is the replay of a CUDA graph.
A layer is compared with what torch offers for dense attention on the same card in the same run: prefill with
scaled_dot_product_attention, decode in absorbed form with matrix products over the latent cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_bench import FP8, INDEX_DIM, NOPE, RANK, ROPE, SCALE, TOPK, VALUE, Bench, Run, causal
from gpu_checks import check_attention, check_graph, check_indexer
from torch import Tensor

from mla2dsa.kernels.gpu.launch import TRITON_NAMES, Launcher
from mla2dsa.kernels.gpu.programs.indexer_program import scores_program
from mla2dsa.kernels.gpu.programs.topk_program import topk_program

SECTIONS = ("indexer", "topk", "sparse", "layer")


def time_indexer(bench: Bench) -> None:
    heads, dim = bench.size(64, 4), bench.size(INDEX_DIM, 32)
    cases = [("prefill", 1, 4096, 65536), ("decode", 1, 1, 131072), ("decode", 32, 1, 131072)]
    for form, batch, queries, slots in cases if not bench.tiny else [("prefill", 1, 8, 64), ("decode", 2, 1, 64)]:
        q, k, weights = (
            bench.randn(batch, queries, heads, dim),
            bench.randn(batch, slots, dim),
            bench.randn(batch, queries, heads, dtype=torch.float32),
        )
        begin, end = causal(batch, queries, slots, bench.device)
        pairs = batch * queries * (slots - queries / 2)
        for dtype in (torch.bfloat16, FP8) if bench.fp8 else (torch.bfloat16,):
            inputs: tuple[Tensor, ...] = (q, k)
            if dtype == FP8:
                (q8, _), (k8, k_scale) = (torch.ops.mla2dsa.quantize_fp8_rows(x, False) for x in (q, k))
                inputs = (q8, k8, k_scale)
            run = Launcher(
                scores_program(TRITON_NAMES[dtype], heads, dim, bench.sm, form, dtype == FP8, "fp32", "i32"), bench.tiny
            )
            timer = bench.graph if form == "decode" else bench.time
            ms = timer(partial(run, *inputs, weights, begin, end))
            moved = batch * slots * dim * inputs[0].element_size() + 4 * pairs
            bench.row(
                "indexer scores",
                f"{form} {TRITON_NAMES[dtype]} B{batch} T{queries} S{slots} HI{heads}",
                ms,
                2 * pairs * heads * dim,
                moved,
                dtype == FP8,
            )


def time_topk(bench: Bench) -> None:
    topk = bench.size(TOPK, 16)
    cases = [
        ("prefill", 1, 2048, 131072),
        ("decode", 1, 1, 131072),
        ("decode", 32, 1, 131072),
        ("decode", 1, 1, 1048576),
    ]
    for form, batch, queries, slots in cases if not bench.tiny else [("prefill", 1, 3, 128), ("decode", 1, 1, 128)]:
        scores = bench.randn(batch, queries, slots, dtype=torch.float32)
        begin, end = causal(batch, queries, slots, bench.device)
        run = Launcher(topk_program(topk, bench.sm, form, "i32"), bench.tiny)
        timer = bench.graph if form == "decode" else bench.time
        ms = timer(partial(run, scores, begin, end))
        torch_ms = timer(partial(torch.topk, scores, topk))
        bench.row(
            "top-k",
            f"{form} B{batch} T{queries} S{slots} K{topk}",
            ms,
            0,
            scores.nbytes,
            torch_topk_over_ours=torch_ms / ms,
        )


def chosen_slots(bench: Bench, batch: int, queries: int, slots: int, topk: int) -> Tensor:
    """Random distinct slots, ascending, as an indexer gives them (a few patterns, repeated)."""
    rows = [torch.randperm(slots, device=bench.device)[:topk].sort().values for _ in range(min(batch * queries, 64))]
    table = torch.stack(rows).to(torch.int32)
    return table[torch.arange(batch * queries, device=bench.device) % len(rows)].view(batch, queries, topk)


def time_sparse(bench: Bench) -> None:
    ops = torch.ops.mla2dsa
    topk = bench.size(TOPK, 32)
    prefill = [(1, 4096, slots, heads) for heads in (128, 16) for slots in (32768, 131072)]
    decode = [(batch, 1, 131072, heads) for heads in (128, 16) for batch in (1, 32, 128)]
    for batch, queries, slots, heads in [*prefill, *decode] if not bench.tiny else [(1, 3, 64, 2), (1, 1, 64, 2)]:
        slots = slots if batch * slots <= 2**23 else 2**23 // batch
        q, kv = bench.randn(batch, queries, heads, RANK + ROPE), bench.randn(batch, slots, RANK + ROPE)
        indices = chosen_slots(bench, batch, queries, slots, topk)
        pairs = batch * queries * topk
        flops = 2 * pairs * heads * (2 * RANK + ROPE)
        case = f"{'decode' if queries == 1 else 'prefill'} B{batch} T{queries} S{slots} H{heads}"
        timer = bench.graph if queries == 1 else bench.time
        # rows that several queries share come from cache: the least traffic is each row once, or each selection once
        rows = min(pairs, batch * slots)
        ms = timer(partial(ops.sparse_mla, q, kv, indices, SCALE, RANK))
        bench.row(
            "sparse_mla",
            case,
            ms,
            flops,
            rows * 2 * (RANK + ROPE),
            gathered_TB_per_s=pairs * 2 * (RANK + ROPE) / ms / 1e9,
        )
        if bench.fp8:
            packed = ops.pack_latent_fp8(kv)
            ms = timer(partial(ops.sparse_mla_fp8, q, packed, indices, SCALE))
            bench.row("sparse_mla_fp8", case, ms, flops, rows * 656, gathered_TB_per_s=pairs * 656 / ms / 1e9)


def time_layer(bench: Bench) -> None:
    """Indexer and sparse attention beside dense attention; prefill of a chunk at the end of the sequence."""
    topk, dim = bench.size(TOPK, 16), bench.size(INDEX_DIM, 32)
    lengths = (8192, 32768, 131072) if not bench.tiny else (64,)
    for heads, index_heads in ((128, 64), (16, 16)) if not bench.tiny else ((2, 2),):
        for slots in lengths:
            queries = min(bench.size(2048, 8), slots // 4)
            layer(bench, "prefill", 1, queries, slots, heads, index_heads, topk, dim)
            for batch in (1, 32) if not bench.tiny else (1,):
                layer(bench, "decode", batch, 1, slots, heads, index_heads, topk, dim)


def layer(
    bench: Bench, phase: str, batch: int, queries: int, slots: int, heads: int, index_heads: int, topk: int, dim: int
) -> None:
    ops = torch.ops.mla2dsa
    index_q, index_k = bench.randn(batch, queries, index_heads, dim), bench.randn(batch, slots, dim)
    weights = bench.randn(batch, queries, index_heads, dtype=torch.float32)
    begin, end = causal(batch, queries, slots, bench.device)
    q, kv = bench.randn(batch, queries, heads, RANK + ROPE), bench.randn(batch, slots, RANK + ROPE)

    def run(index_q: Tensor = index_q, index_k: Tensor = index_k) -> object:
        chosen = ops.lightning_indexer(index_q, index_k, weights, begin, end, topk)
        return ops.sparse_mla(q, kv, chosen, SCALE, RANK)

    timer = bench.graph if phase == "decode" else bench.time
    sparse = {"bf16": timer(run)}
    if bench.fp8:
        (q8, _), (k8, k_scale) = (ops.quantize_fp8_rows(x, False) for x in (index_q, index_k))

        def run_fp8() -> object:
            return ops.sparse_mla(
                q, kv, ops.lightning_indexer_fp8(q8, k8, k_scale, weights, begin, end, topk), SCALE, RANK
            )

        sparse["fp8 indexer"] = timer(run_fp8)
    dense = timer(dense_decode(q, kv)) if phase == "decode" else timer(dense_prefill(bench, queries, slots, heads))
    for name, ms in sparse.items():
        bench.row(
            f"layer, {name}",
            f"{phase} B{batch} T{queries} S{slots} H{heads} HI{index_heads}",
            ms,
            dense_ms=dense,
            dense_over_DSA=dense / ms,
        )


def dense_decode(q: Tensor, kv: Tensor) -> Run:
    """Absorbed form: q [B,1,H,R+dr] over kv [B,S,R+dr]."""
    return lambda: ((q[:, 0] @ kv.mT).float() * SCALE).softmax(-1).to(q.dtype) @ kv[..., :RANK]


def dense_prefill(bench: Bench, queries: int, slots: int, heads: int) -> Run:
    """Per-head form, values padded to the width of the keys, as the fused kernels want it; causal at the end of the sequence."""
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = (bench.randn(1, heads, n, NOPE + ROPE) for n in (queries, slots, slots))
    v = F.pad(v[..., :VALUE], (0, NOPE + ROPE - VALUE))
    bias = causal_lower_right(queries, slots)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=SCALE)


def machine(bench: Bench) -> dict[str, Any]:
    import triton

    name = "CPU, interpreter" if bench.tiny else torch.cuda.get_device_name()
    return {"device": name, "sm": bench.sm, "torch": torch.__version__, "triton": triton.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        os.environ["MLA2DSA_KERNELS"] = "triton"
    elif not torch.cuda.is_available():
        print("no CUDA device; --tiny runs this on the CPU", file=sys.stderr)
        return 2
    from mla2dsa.kernels import ops  # noqa: F401  registers them

    torch.manual_seed(0)
    bench = Bench(args.tiny)
    about = machine(bench)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for check in (check_indexer, check_attention, check_graph):
        check(bench)
    bench.measure_ceilings()
    timers = {"indexer": time_indexer, "topk": time_topk, "sparse": time_sparse, "layer": time_layer}
    for section in args.only:
        timers[section](bench)
        if not bench.tiny:
            torch.cuda.empty_cache()
    if args.json:
        ceilings = {"bytes_per_s": bench.bandwidth, "bf16_flops": bench.flops}
        args.json.write_text(
            json.dumps({"machine": about, "ceilings": ceilings, "checks": bench.checks, "rows": bench.rows}, indent=1)
        )
    failed = [entry["check"] for entry in bench.checks if not entry["passed"]]
    print(
        f"{len(bench.checks) - len(failed)} of {len(bench.checks)} checks passed"
        + "".join(f"\nFAILED: {name}" for name in failed)
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
