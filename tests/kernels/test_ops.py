"""The ops against brute-force loops, the CPU path against the reference, and what both promise at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from comparing import close, compare
from op_samples import FLOAT_TOLERANCE, causal, randn, ranges, small_ints
from torch import Tensor

from mla2dsa.kernels import cpu, ops, reference
from mla2dsa.kernels.native_ops import CPU_ENV

BOTH = pytest.mark.parametrize("impl", [reference, cpu], ids=["reference", "cpu"])


def brute_indexer(q: Tensor, k: Tensor, weights: Tensor, begin: Tensor, end: Tensor, topk: int) -> Tensor:
    batch, queries, heads, _ = q.shape
    slots = k.shape[1]
    out = torch.full((batch, queries, min(topk, slots)), -1, dtype=torch.int32)
    for b in range(batch):
        for t in range(queries):
            scored = []
            for s in range(max(0, int(begin[b, t])), min(slots, int(end[b, t]))):
                dots = [float(q[b, t, h].double() @ k[b, s].double()) for h in range(heads)]
                score = sum(float(weights[b, t, h]) * max(0.0, dot) for h, dot in enumerate(dots))
                scored.append((-score, s))
            best = sorted(s for _, s in sorted(scored)[:topk])
            out[b, t, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return out


def brute_sparse(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
    out = torch.zeros(*q.shape[:3], kv_lora_rank, dtype=torch.float64)
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        rows = [kv[b, s].double() for s in indices[b, t].tolist() if 0 <= s < kv.shape[1]]
        mass = [math.exp(scale * float(q[b, t, h].double() @ row)) for row in rows]
        for p, row in zip(mass, rows, strict=True):
            out[b, t, h] += p / sum(mass) * row[:kv_lora_rank]
    return out


# batch, queries, slots, index heads, topk
INDEXER_SHAPES = [
    (2, 5, 9, 3, 4),
    (1, 1, 1, 1, 1),
    (1, 1, 40, 1, 3),
    (2, 7, 1, 2, 5),
    (1, 6, 8, 4, 8),
    (2, 40, 37, 2, 6),
    (1, 4, 6, 2, 99),
]


@BOTH
@pytest.mark.parametrize("shape", INDEXER_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_indexer_equals_brute_force_with_ties(impl: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, queries, slots, heads, topk = shape
    args = (small_ints(batch, queries, heads, 4, dtype=dtype), small_ints(batch, slots, 4, seed=1, dtype=dtype))
    weights, (begin, end) = small_ints(batch, queries, heads, seed=2, dtype=dtype), ranges(batch, queries, slots)
    got = impl.lightning_indexer(*args, weights, begin, end, topk)
    assert got.dtype == torch.int32
    assert torch.equal(got, brute_indexer(*args, weights, begin, end, topk))


@pytest.mark.parametrize("topk", [1, 64, 300, 1000])
def test_indexer_cpu_equals_reference_over_many_tiles(topk: int) -> None:
    q, k, weights = randn(2, 150, 4, 16), randn(2, 700, 16, seed=1), randn(2, 150, 4, seed=2)
    begin, end = ranges(2, 150, 700)
    want = reference.lightning_indexer(q, k, weights, begin, end, topk)
    assert torch.equal(cpu.lightning_indexer(q, k, weights, begin, end, topk), want)
    assert torch.equal(cpu.lightning_indexer(q, k, weights, begin, end, topk, budget_mb=0), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_indexer_picks_the_best_scores_in_low_precision(dtype: torch.dtype) -> None:
    q, k, weights = randn(1, 40, 8, 64, dtype=dtype), randn(1, 500, 64, seed=1, dtype=dtype), randn(1, 40, 8, seed=2)
    begin, end = causal(1, 40, past=460)
    got = cpu.lightning_indexer(q, k, weights.float(), begin, end, 32).long()
    scores = (weights.unsqueeze(-1) * (q.double() @ k.double().mT.unsqueeze(1)).relu()).sum(2)
    scores = scores.masked_fill(torch.arange(500) >= end.unsqueeze(-1), -torch.inf)
    best = scores.topk(32).values
    close(scores.gather(-1, got).sort(descending=True).values, best, atol=1e-4)


@BOTH
def test_indexer_topk_beyond_the_range_lists_the_range(impl: ModuleType) -> None:
    begin, end = torch.tensor([[2, 0, 5]]), torch.tensor([[4, 0, 99]])
    got = impl.lightning_indexer(randn(1, 3, 2, 4), randn(1, 8, 4), randn(1, 3, 2), begin, end, 5)
    assert got.tolist() == [[[2, 3, -1, -1, -1], [-1] * 5, [5, 6, 7, -1, -1]]]


@BOTH
def test_indexer_nan_and_minus_inf_rank_last_in_slot_order(impl: ModuleType) -> None:
    q, weights = torch.ones(1, 3, 1, 1), torch.tensor([[[1.0], [1.0], [-1.0]]])
    k = torch.tensor([1.0, torch.nan, 3.0, torch.inf, torch.nan, 2.0]).view(1, 6, 1)
    begin, end = torch.tensor([[0, 0, 1]]), torch.tensor([[6, 2, 5]])
    got = impl.lightning_indexer(q, k, weights, begin, end, 3)
    assert got.tolist() == [[[2, 3, 5], [0, 1, -1], [1, 2, 3]]]
    assert impl.lightning_indexer(q * torch.nan, k, weights, begin, end, 3).tolist() == [
        [[0, 1, 2], [0, 1, -1], [1, 2, 3]]
    ]


@BOTH
def test_indexer_nan_outside_the_range_changes_nothing(impl: ModuleType) -> None:
    q, k, weights = randn(1, 4, 2, 8), randn(1, 12, 8, seed=1), randn(1, 4, 2, seed=2)
    begin, end = torch.full((1, 4), 2), torch.full((1, 4), 9)
    want = impl.lightning_indexer(q, k, weights, begin, end, 3)
    k[:, :2], k[:, 9:] = torch.nan, torch.inf
    assert torch.equal(impl.lightning_indexer(q, k, weights, begin, end, 3), want)


# batch, queries, slots, heads, kv_lora_rank, qk_rope_head_dim, selected
SPARSE_SHAPES = [
    (2, 5, 9, 3, 8, 4, 4),
    (1, 1, 1, 1, 1, 0, 1),
    (1, 3, 30, 16, 16, 8, 30),
    (2, 40, 37, 1, 8, 2, 5),
    (1, 2, 5, 2, 4, 2, 0),
]


def sparse_inputs(shape: tuple[int, ...], dtype: torch.dtype, low: int = -2, beyond: int = 3) -> tuple[Tensor, ...]:
    batch, queries, slots, heads, rank, rope, selected = shape
    g = torch.Generator().manual_seed(3)
    indices = torch.randint(low, slots + beyond, (batch, queries, selected), generator=g, dtype=torch.int32)
    return (
        randn(batch, queries, heads, rank + rope, dtype=dtype),
        randn(batch, slots, rank + rope, seed=1, dtype=dtype),
        indices,
    )


@BOTH
@pytest.mark.parametrize("shape", SPARSE_SHAPES, ids=str)
def test_sparse_equals_brute_force(impl: ModuleType, shape: tuple[int, ...]) -> None:
    q, kv, indices = sparse_inputs(shape, torch.float64)  # -1 and out-of-range slots anywhere in a row
    torch.testing.assert_close(
        impl.sparse_mla(q, kv, indices, 0.3, shape[4]),
        brute_sparse(q, kv, indices, 0.3, shape[4]),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("ragged", [False, True], ids=["all-valid", "ragged"])
@pytest.mark.parametrize("shape", [(2, 33, 64, 4, 32, 8, 16), (1, 5, 3000, 4, 64, 32, 2900)], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_TOLERANCE, ids=str)
def test_sparse_cpu_matches_reference(dtype: torch.dtype, shape: tuple[int, ...], ragged: bool) -> None:
    q, kv, indices = sparse_inputs(shape, dtype, *((-9, 9) if ragged else (0, 0)))
    want = reference.sparse_mla(q.double(), kv.double(), indices, 0.4, shape[4])
    got = cpu.sparse_mla(q, kv, indices, 0.4, shape[4])
    assert got.dtype == dtype
    close(got, want, rms=FLOAT_TOLERANCE[dtype])
    close(reference.sparse_mla(q, kv, indices, 0.4, shape[4]), want, rms=FLOAT_TOLERANCE[dtype])


@pytest.mark.skipif(not cpu.has_bfloat16_gemm(torch.bfloat16), reason="this machine has no bfloat16 GEMM")
def test_bfloat16_logits_keep_16_bits() -> None:
    a, b = randn(16, 64, dtype=torch.bfloat16), randn(64, 300, seed=1, dtype=torch.bfloat16)
    close(cpu._product(a, b), a.double() @ b.double(), rms=2**-16)
    assert compare(a @ b, a.double() @ b.double()).rms > 2**-11  # what a plain bfloat16 product would give


@BOTH
@pytest.mark.parametrize("queries", [1, 3])
def test_sparse_row_without_keys_is_zero_whatever_the_cache_holds(impl: ModuleType, queries: int) -> None:
    kv = torch.full((1, 4, 6), torch.nan)
    kv[:, 2] = 1.0
    indices = torch.tensor([[[-1, 9, -7], [-1, 2, 4], [-1, -1, -1]]], dtype=torch.int32)[:, :queries]
    got = impl.sparse_mla(torch.ones(1, queries, 2, 6), kv, indices, 1.0, 4)
    want = torch.tensor([0.0, 1.0, 0.0])[:queries].view(1, -1, 1, 1).expand(1, queries, 2, 4)
    assert torch.equal(got, want)


@BOTH
def test_sparse_over_all_selected_keys_is_dense_attention(impl: ModuleType) -> None:
    """S <= topk: DSA is dense attention."""
    q, kv, (begin, end) = randn(2, 6, 3, 12), randn(2, 6, 12, seed=1), causal(2, 6)
    indices = impl.lightning_indexer(randn(2, 6, 2, 4), randn(2, 6, 4), randn(2, 6, 2), begin, end, 8)
    dense = ops.anchors.dense_attention(
        q.transpose(1, 2), kv[:, None].expand(2, 3, 6, 12), kv[:, None, :, :8].expand(2, 3, 6, 8), None, 0.3
    )
    torch.testing.assert_close(impl.sparse_mla(q, kv, indices, 0.3, 8), dense.transpose(1, 2), rtol=1e-12, atol=1e-12)


@BOTH
def test_mass_is_the_mean_of_the_heads_distributions(impl: ModuleType) -> None:
    q, kv, (begin, end) = randn(2, 6, 3, 8), randn(2, 9, 8, seed=1), ranges(2, 6, 9, seed=5)
    got = impl.attention_mass(q, kv, begin, end, 0.5)
    for b, r in torch.cartesian_prod(torch.arange(2), torch.arange(6)).tolist():
        lo, hi = max(0, int(begin[b, r])), min(9, int(end[b, r]))
        want = torch.zeros(9, dtype=torch.float64)
        for h in range(3 if lo < hi else 0):
            want[lo:hi] += (0.5 * kv[b, lo:hi] @ q[b, r, h]).exp() / (0.5 * kv[b, lo:hi] @ q[b, r, h]).exp().sum() / 3
        torch.testing.assert_close(got[b, r], want, rtol=1e-12, atol=1e-12)
    assert {int(n) for n in got.sum(-1).round().unique()} == {0, 1}  # the ranges hold both kinds of row


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_mass_cpu_matches_reference_over_many_tiles(dtype: torch.dtype) -> None:
    q, kv, (begin, end) = randn(2, 50, 4, 16, dtype=dtype), randn(2, 300, 16, seed=1, dtype=dtype), ranges(2, 50, 300)
    got = cpu.attention_mass(q, kv, begin, end, 0.5, budget_mb=1)
    assert cpu.mass_rows(300, 4, 1) < 50
    assert got.dtype == reference.accumulation_dtype(dtype)
    close(got, reference.attention_mass(q.double(), kv.double(), begin, end, 0.5), rms=1e-6)


def test_strided_inputs() -> None:
    q, k, weights = randn(4, 2, 3, 8), randn(8, 30, 2), randn(3, 4, 2)
    q, k, weights = q.permute(1, 0, 2, 3), k.permute(2, 1, 0), weights.permute(2, 1, 0)
    begin, end = torch.zeros(1, 1, dtype=torch.int32).expand(2, 4), torch.full((4, 2), 30).T
    indices = ops.lightning_indexer(q, k, weights, begin, end, 5)
    dense = [x.contiguous() for x in (q, k, weights, begin, end)]
    assert torch.equal(indices, reference.lightning_indexer(*dense, 5))
    wide = indices.repeat_interleave(2, -1)[..., ::2]
    torch.testing.assert_close(ops.sparse_mla(q, k, wide, 0.2, 6), reference.sparse_mla(q, k, indices, 0.2, 6))
    torch.testing.assert_close(
        ops.attention_mass(q, k, begin, end, 0.2), reference.attention_mass(*dense[:2], *dense[3:], 0.2)
    )


def peak_bytes(run: Callable[[], Tensor]) -> int:
    """The most memory torch held at once beyond what it held before, less the result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - result.nbytes


@pytest.mark.parametrize("queries", [128, 512])
def test_extra_memory_is_bounded(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_ENV, "torch")  # only torch's own allocations are seen
    slots, heads, mb = 16384, 4, 2**20
    q, k, weights = (
        randn(1, queries, heads, 16, dtype=torch.float32),
        randn(1, slots, 16, dtype=torch.float32),
        torch.ones(1, queries, heads),
    )
    begin, end = causal(1, queries, past=slots - queries)
    indices = torch.zeros(1, queries, 512, dtype=torch.int32)
    assert queries * slots * heads * 4 >= 4 * 4 * mb
    assert mb < peak_bytes(lambda: cpu.lightning_indexer(q, k, weights, begin, end, 64, budget_mb=4)) < 5 * mb
    assert mb < peak_bytes(lambda: cpu.attention_mass(q, k, begin, end, 0.5, budget_mb=4)) < 5 * mb
    assert mb / 2 < peak_bytes(lambda: cpu.sparse_mla(q, k, indices, 0.5, 8, budget_mb=4)) < 5 * mb
