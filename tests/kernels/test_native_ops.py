"""The C++ of every path this processor has against the reference, and what happens where it cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from comparing import close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_samples import FLOAT_TOLERANCE, causal, randn, ranges, small_ints
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.kernels import cpu, native_ops, ops, reference
from mla2dsa.kernels.native_ops import CPU_ENV, PATHS

BF16 = torch.bfloat16
WAYS = [(name, dtype) for name, path in PATHS.items() for dtype in path.dtypes]


@dataclass(frozen=True)
class Way:
    """A path, and the type of what goes through it."""

    name: str
    dtype: torch.dtype

    def sparse(self, q: Tensor, kv: Tensor, indices: Tensor, scale: float, rank: int) -> Tensor:
        return native_ops.sparse_mla(self.name, q, kv, indices, scale, rank)

    def indexer(
        self, q: Tensor, k: Tensor, weights: Tensor, begin: Tensor, end: Tensor, topk: int, mb: int = 64
    ) -> Tensor:
        return native_ops.lightning_indexer(self.name, q, k, weights, begin, end, topk, mb)


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{str(way[1]).removeprefix('torch.')}")
def way(request: pytest.FixtureRequest) -> Way:
    name, dtype = request.param
    if native_ops.library(name) is None:
        pytest.skip(f"{name}: {native_ops.status(name)}")
    return Way(name, dtype)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(native_ops, "_GRAIN", 1)  # however small the work
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


# batch, queries, slots, heads, kv_lora_rank, qk_rope_head_dim, selected
SPARSE = [
    (1, 1, 1, 1, 1, 0, 1), (2, 5, 40, 3, 8, 4, 7), (1, 3, 300, 16, 64, 16, 255), (2, 2, 700, 16, 512, 64, 600),
    (1, 2, 600, 20, 512, 64, 257), (1, 2, 90, 128, 256, 64, 90), (1, 2, 50, 17, 40, 24, 33), (1, 3, 9, 4, 64, 0, 0),
    (1, 2, 70, 5, 64, 33, 65), (1, 1, 300, 2, 1, 600, 200),
]  # fmt: skip
# batch, queries, slots, index heads, width, topk
INDEXER = [
    (1, 1, 1, 1, 1, 1), (2, 5, 40, 3, 16, 7), (1, 70, 900, 8, 128, 64), (2, 33, 700, 64, 128, 100), (1, 1, 3000, 16, 128, 2048),
    (1, 130, 300, 20, 40, 30), (3, 7, 64, 5, 33, 99), (1, 2, 5000, 17, 64, 1),
]  # fmt: skip


def sparse_inputs(shape: tuple[int, ...], dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, slots, heads, rank, rope, selected = shape
    g = torch.Generator().manual_seed(3)
    indices = torch.randint(-3, slots + 3, (batch, queries, selected), generator=g, dtype=torch.int32)
    q, kv = (
        randn(batch, queries, heads, rank + rope, dtype=dtype),
        randn(batch, slots, rank + rope, seed=1, dtype=dtype),
    )
    return q, kv, indices


@pytest.mark.parametrize("shape", SPARSE, ids=str)
def test_sparse_mla(shape: tuple[int, ...], threads: int, way: Way) -> None:
    q, kv, indices = sparse_inputs(shape, way.dtype)
    got = way.sparse(q, kv, indices, 0.3, shape[4])
    want = reference.sparse_mla(q.double(), kv.double(), indices, 0.3, shape[4])
    assert got.dtype == way.dtype
    close(got, want, rms=FLOAT_TOLERANCE[way.dtype])
    assert torch.equal(got, way.sparse(q, kv, indices, 0.3, shape[4]))


def test_sparse_mla_at_the_edges(way: Way) -> None:
    """No valid slot: 0. NaN in a row that is not selected: nothing. NaN, inf and very large logits: as the reference."""
    q, kv, indices = sparse_inputs((1, 6, 40, 4, 64, 32, 20), way.dtype)
    indices = indices.clamp(0, 30)
    indices[0, 0] = -1
    kv[0, 31:] = torch.nan
    kv[0, 0, 3], kv[0, 1, 5] = torch.nan, torch.inf
    indices[0, 1:4] = indices[0, 1:4].clamp(2)
    indices[0, 4, 0], indices[0, 5] = 0, indices[0, 5].clamp(1)
    q[0, 3] *= 200  # logits of some thousands
    got, want = way.sparse(q, kv, indices, 1.0, 64), reference.sparse_mla(q.float(), kv.float(), indices, 1.0, 64)
    assert torch.equal(got[0, 0], torch.zeros(4, 64, dtype=way.dtype))
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got[0, 1:4].float(), want[0, 1:4], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("width", [96, 95], ids=["even rows", "odd rows"])
def test_sparse_mla_reads_nothing_behind_the_last_row(width: int, way: Way) -> None:
    """Rows are read where they lie if whole vectors fit into them, else copied; the NaN behind them is never seen."""
    q, kv, indices = sparse_inputs((1, 2, 9, 3, 64, width - 64, 30), way.dtype)
    beyond = torch.cat((kv, torch.full_like(kv, torch.nan)), 1)
    got = way.sparse(q, beyond[:, :9], indices, 0.3, 64)
    assert torch.equal(got, way.sparse(q, kv, indices, 0.3, 64))
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("past", [0, 60, 130], ids="{} before".format)
@pytest.mark.parametrize("heads", [3, 20], ids="{} heads".format)
def test_queries_that_select_all_they_see_go_together(past: int, heads: int, way: Way, threads: int) -> None:
    """Each as it would be alone, bit for bit, and without a look at rows that only its neighbours see: these are NaN."""
    tokens = 11
    q, kv, _ = sparse_inputs((1, tokens, past + tokens + 1, heads, 64, 32, 1), way.dtype)
    indices = torch.arange(past + tokens, dtype=torch.int32).repeat(1, tokens, 1)
    indices = indices.masked_fill(indices >= causal(1, tokens, past)[1].unsqueeze(-1), -1)
    indices[0, 5] = indices[0, 5].flip(0)  # not as its neighbours
    indices[0, 8] = -1  # nothing at all
    kv[0, past + 7 :] = torch.nan
    got = way.sparse(q, kv, indices, 0.3, 64)
    alone = [way.sparse(q[:, t : t + 1], kv, indices[:, t : t + 1], 0.3, 64) for t in range(tokens)]
    assert torch.equal(got.isnan(), torch.cat(alone, 1).isnan())
    assert torch.equal(got.nan_to_num(), torch.cat(alone, 1).nan_to_num())
    assert got.isfinite().flatten(2).all(-1).tolist() == [[True] * 7 + [False, True, False, False]]


def test_threads_change_no_bit(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer queries than threads share the rows of one, in chunks; as many as there are take one each."""
    if way.name == "amx":
        pytest.skip("amx: threads share queries alone")
    monkeypatch.setattr(native_ops, "_GRAIN", 1)
    q, kv, indices = sparse_inputs((1, 3, 1500, 20, 64, 32, 1300), way.dtype)
    k, weights = kv[..., :40].contiguous(), randn(1, 3, 20, seed=2)
    begin, end = causal(1, 3, past=1490)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        best = way.indexer(q[..., :40], k, weights.float(), begin, end, 300)
        results.append((way.sparse(q, kv, indices, 0.3, 64), best))
    torch.set_num_threads(1)
    for sums, best in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(best, results[0][1])


@pytest.mark.parametrize("shape", INDEXER, ids=str)
@pytest.mark.parametrize("budget_mb", [0, 64], ids=["query by query", "tiles"])
def test_lightning_indexer_with_ties(shape: tuple[int, ...], budget_mb: int, threads: int, way: Way) -> None:
    """Small integers: every order of summation gives the same score, and equal scores are common."""
    batch, queries, slots, heads, width, topk = shape
    q, k = (
        small_ints(batch, queries, heads, width, dtype=way.dtype),
        small_ints(batch, slots, width, seed=1, dtype=way.dtype),
    )
    weights, (begin, end) = small_ints(batch, queries, heads, seed=2), ranges(batch, queries, slots)
    got = way.indexer(q, k, weights, begin, end, topk, budget_mb)
    assert torch.equal(got, reference.lightning_indexer(q, k, weights, begin, end, topk))


def test_lightning_indexer_picks_the_best_scores(way: Way) -> None:
    q, k = randn(1, 40, 8, 64, dtype=way.dtype), randn(1, 500, 64, seed=1, dtype=way.dtype)
    weights, (begin, end) = randn(1, 40, 8, seed=2), causal(1, 40, past=460)
    got = way.indexer(q, k, weights.float(), begin, end, 32).long()
    scores = (weights.unsqueeze(-1) * (q.double() @ k.double().mT.unsqueeze(1)).relu()).sum(2)
    scores = scores.masked_fill(torch.arange(500) >= end.unsqueeze(-1), -torch.inf)
    close(scores.gather(-1, got).sort(descending=True).values, scores.topk(32).values, atol=1e-4)


# A key of width 1 under q = w = 1 scores itself, if it is positive: any row of scores can be made.
EXACT = st.sampled_from([0.0, 1.0, 2.0, 3e38, 1e-30, 0.25, float("inf"), float("nan"), 1.0078125])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EXACT, min_size=1, max_size=200), st.integers(1, 64), st.sampled_from([1.0, -1.0]), st.data())
def test_selection_is_a_stable_sort(way: Way, values: list[float], topk: int, sign: float, data: st.DataObject) -> None:
    k = torch.tensor(values).to(way.dtype).view(1, -1, 1)
    begin = torch.tensor([[data.draw(st.integers(-2, len(values)))]])
    end = torch.tensor([[data.draw(st.integers(-2, len(values) + 2))]])
    q, weights = torch.ones(1, 1, 1, 1, dtype=way.dtype), torch.full((1, 1, 1), sign)
    want = reference.lightning_indexer(q, k, weights, begin, end, topk)
    assert torch.equal(way.indexer(q, k, weights, begin, end, topk), want)


@pytest.mark.parametrize("shape", [(2, 5, 40, 3, 8, 4, 7), (1, 3, 300, 16, 64, 16, 255)], ids=str)
def test_torch_gives_the_same(shape: tuple[int, ...], way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the ops, the path being named in the environment."""
    q, kv, indices = sparse_inputs(shape, way.dtype)
    weights, (begin, end) = small_ints(*q.shape[:3], seed=2), ranges(*q.shape[:2], kv.shape[1])
    exact = (
        small_ints(*q.shape, dtype=way.dtype),
        small_ints(*kv.shape, seed=1, dtype=way.dtype),
        weights,
        begin,
        end,
        9,
    )
    monkeypatch.setenv(CPU_ENV, way.name)
    assert native_ops.taken(way.dtype) == way.name
    with_it = ops.sparse_mla(q, kv, indices, 0.3, shape[4]), ops.lightning_indexer(*exact)
    monkeypatch.setenv(CPU_ENV, "torch")
    assert native_ops.taken(way.dtype) == "torch"
    close(ops.sparse_mla(q, kv, indices, 0.3, shape[4]), with_it[0], rms=FLOAT_TOLERANCE[way.dtype])
    assert torch.equal(ops.lightning_indexer(*exact), with_it[1])


def test_the_best_path_there_is_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CPU_ENV, raising=False)
    able = {"avx512", "avx2", "portable"}
    monkeypatch.setattr(native_ops, "_load", lambda name: (object(), "usable") if name in able else (None, "not here"))
    assert [native_ops.taken(dtype) for dtype in (BF16, torch.float32)] == ["avx512"] * 2
    assert [native_ops.taken(dtype) for dtype in (torch.float16, torch.float64)] == ["torch"] * 2
    able.add("amx")
    assert [native_ops.taken(dtype) for dtype in (BF16, torch.float32)] == ["amx", "avx512"]
    assert native_ops.summary() == "usable: bfloat16 on amx, float32 on avx512"
    able.clear()
    assert native_ops.taken(BF16) == "torch"
    assert native_ops.summary() == "not here"
    monkeypatch.setattr(native_ops, "_call", lambda *_: pytest.fail("C++ that cannot be had was called"))
    assert cpu.sparse_mla(*sparse_inputs((1, 1, 4, 2, 4, 2, 3)), 0.3, 4).shape == (1, 1, 2, 4)


def test_a_path_that_is_named_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_ops, "_load", lambda name: (None, "this processor has no avx9"))
    monkeypatch.setenv(CPU_ENV, "avx2")
    with pytest.raises(UserError, match=r"^MLA2DSA_CPU=avx2 cannot be had here: this processor has no avx9$"):
        ops.sparse_mla(*sparse_inputs((1, 1, 4, 2, 4, 2, 3)), 0.3, 4)
    assert native_ops.summary() == "MLA2DSA_CPU=avx2 cannot be had here: this processor has no avx9"
    monkeypatch.setenv(CPU_ENV, "avx9")
    with pytest.raises(
        UserError, match=r"MLA2DSA_CPU=avx9 is not known: unset it, or set it to one of amx, .*, torch$"
    ):
        native_ops.taken(BF16)


def test_why_a_path_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = native_ops._load.__wrapped__  # what was loaded before stays known
    monkeypatch.setattr(native_ops, "_processor_flags", lambda: frozenset(("avx2", "fma")))
    if native_ops.platform.machine() == "x86_64":
        assert load("avx512") == (None, "this processor has no avx512bw, avx512dq, avx512f, avx512vl")
    monkeypatch.setenv("CXX", "nosuch")
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path))
    assert load("portable")[1] == "no C++ compiler (nosuch) on the PATH; install one, or set CXX"
    monkeypatch.setattr(native_ops.sys, "platform", "win32")
    assert load("portable") == (None, "needs Linux")
    assert load("avx2") == (None, "needs Linux on x86-64")
