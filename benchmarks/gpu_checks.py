"""Is what the GPU computes right: every op against float64, the top-k against a stable sort, a CUDA graph against a direct call."""

from __future__ import annotations

import torch
from gpu_bench import FP8, INDEX_DIM, RANK, ROPE, SCALE, TOPK, Bench, causal, relative_rms
from torch import Tensor

from mla2dsa.kernels import reference, reference_fp8
from mla2dsa.kernels.gpu.launch import TRITON_NAMES, Launcher
from mla2dsa.kernels.gpu.programs.indexer_program import scores_program
from mla2dsa.kernels.gpu.programs.topk_program import topk_program


def check_indexer(bench: Bench) -> None:
    """Scores against float64, selections against a stable sort of the very scores, bit for bit; twice the same."""
    ops = torch.ops.mla2dsa
    queries, slots, heads, topk = bench.size(96, 5), bench.size(5000, 70), bench.size(64, 3), bench.size(2048, 16)
    dim = bench.size(INDEX_DIM, 32)
    for form in ("prefill", "decode"):
        for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-3), (FP8, 3e-3)):
            if dtype == FP8 and not bench.fp8:
                continue
            q, k, weights = (
                bench.randn(2, queries, heads, dim),
                bench.randn(2, slots, dim),
                bench.randn(2, queries, heads, dtype=torch.float32),
            )
            scale: tuple[Tensor, ...] = ()
            if dtype == FP8:
                (q, _), (k, k_scale) = ops.quantize_fp8_rows(q, False), ops.quantize_fp8_rows(k, False)
                scale = (k_scale,)
            else:
                q, k = q.to(dtype), k.to(dtype)
            begin, end = causal(2, queries, slots, bench.device)
            facts = (TRITON_NAMES[dtype], heads, dim, bench.sm, form, dtype == FP8, "fp32", "i32")
            got = Launcher(scores_program(*facts), bench.tiny)(q, k, *scale, weights, begin, end)[0]
            want = torch.einsum("bthd,bsd->bths", q.double().cpu(), k.double().cpu()).relu()
            want = torch.einsum("bths,bth->bts", want, weights.double().cpu()) * (
                scale[0].double().cpu()[:, None] if scale else 1
            )
            seen = reference.in_range(begin, end, slots).cpu()
            bench.check(f"scores, {form}, {dtype}", relative_rms(got[..., :slots].cpu()[seen], want[seen]), limit)
            for about, values in (("as they are", got), ("rounded, many ties", got.round())):
                _check_topk(bench, form, f"{dtype} {about}", values, (begin, end, seen), topk)


def _check_topk(
    bench: Bench, form: str, about: str, values: Tensor, ranges: tuple[Tensor, Tensor, Tensor], topk: int
) -> None:
    """values: scores [B,T,S rounded up]. ranges: key_begin, key_end, and the keys [B,T,S] that lie in between."""
    begin, end, seen = ranges
    slots = seen.shape[-1]
    select = Launcher(topk_program(topk, bench.sm, form, "i32"), bench.tiny)
    chosen, again = select(values, begin, end)[0], select(values, begin, end)[0]
    ranked = values[..., :slots].cpu().masked_fill(~seen, -torch.inf).sort(dim=-1, descending=True, stable=True)
    best = ranked.indices[..., :topk].masked_fill(ranked.values[..., :topk] == -torch.inf, slots).sort(-1).values
    expected = best.masked_fill(best == slots, -1)
    bench.check(f"top-k, {form}, scores of {about}", float((chosen.cpu() != expected).sum()), 0)
    bench.check(f"top-k, {form}, twice the same", float((chosen != again).sum()), 0)


def check_attention(bench: Bench) -> None:
    """Against float64, with slots that are not there in between and a query without any."""
    ops = torch.ops.mla2dsa
    slots, topk = bench.size(4000, 80), bench.size(1000, 40)
    for queries in (1, bench.size(200, 3)):  # the split form and the whole one
        for heads in (1, 16, 128) if not bench.tiny else (3,):
            indices = torch.randint(-200, slots + 200, (2, queries, topk), device=bench.device, dtype=torch.int32)
            indices[0, 0] = -1
            for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-3)):
                q, kv = (
                    bench.randn(2, queries, heads, RANK + ROPE, dtype=dtype),
                    bench.randn(2, slots, RANK + ROPE, dtype=dtype),
                )
                want = reference.sparse_mla(q.double().cpu(), kv.double().cpu(), indices.cpu(), SCALE, RANK)
                got = ops.sparse_mla(q, kv, indices, SCALE, RANK)
                bench.check(f"sparse_mla, {queries} queries, {heads} heads, {dtype}", relative_rms(got, want), limit)
            if bench.fp8:
                packed = ops.pack_latent_fp8(kv)
                want = reference_fp8.sparse_mla_fp8(q.cpu(), packed.cpu(), indices.cpu(), SCALE)
                bench.check(
                    f"sparse_mla_fp8, {queries} queries, {heads} heads",
                    relative_rms(ops.sparse_mla_fp8(q, packed, indices, SCALE), want),
                    3e-3,
                )


def check_graph(bench: Bench) -> None:
    """A replay sees new inputs in the old places."""
    if bench.tiny:
        return
    ops = torch.ops.mla2dsa
    q, kv = bench.randn(4, 1, 16, RANK + ROPE), bench.randn(4, 9000, RANK + ROPE)
    index_q, index_k, weights = (
        bench.randn(4, 1, 32, INDEX_DIM),
        bench.randn(4, 9000, INDEX_DIM),
        bench.randn(4, 1, 32, dtype=torch.float32),
    )
    begin, end = causal(4, 1, 9000, bench.device)

    def run() -> Tensor:
        chosen = ops.lightning_indexer(index_q, index_k, weights, begin, end, TOPK)
        out: Tensor = ops.sparse_mla(q, kv, chosen, SCALE, RANK)
        return out

    run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = run()
    end.sub_(4000)
    index_q.normal_()
    captured.replay()
    bench.check("CUDA graph: replay = direct call on changed inputs", float((out != run()).sum()), 0)
