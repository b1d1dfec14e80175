"""The C++ on AMX tiles against the reference, and what happens where it cannot be had."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comparing import close
from hypothesis import given, settings
from hypothesis import strategies as st
from op_samples import causal, randn, ranges, small_ints
from torch import Tensor

from mla2dsa.kernels import amx, cpu, native_build, reference
from mla2dsa.kernels.native_build import BuildError, build_library

BF16 = torch.bfloat16
TILES = pytest.mark.skipif(amx.library() is None, reason=f"AMX: {amx.status()}")


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


# batch, queries, slots, heads, kv_lora_rank, qk_rope_head_dim, selected
SPARSE = [
    (1, 1, 1, 1, 1, 0, 1), (2, 5, 40, 3, 8, 4, 7), (1, 3, 300, 16, 64, 16, 255), (2, 2, 700, 16, 512, 64, 600),
    (1, 2, 600, 20, 512, 64, 257), (1, 2, 90, 128, 256, 64, 90), (1, 2, 50, 17, 40, 24, 33), (1, 3, 9, 4, 64, 0, 0),
]  # fmt: skip
# batch, queries, slots, index heads, width, topk
INDEXER = [
    (1, 1, 1, 1, 1, 1), (2, 5, 40, 3, 16, 7), (1, 70, 900, 8, 128, 64), (2, 33, 700, 64, 128, 100), (1, 1, 3000, 16, 128, 2048),
    (1, 130, 300, 20, 40, 30), (3, 7, 64, 5, 33, 99), (1, 2, 5000, 17, 64, 1),
]  # fmt: skip


def sparse_inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, slots, heads, rank, rope, selected = shape
    g = torch.Generator().manual_seed(3)
    indices = torch.randint(-3, slots + 3, (batch, queries, selected), generator=g, dtype=torch.int32)
    q, kv = randn(batch, queries, heads, rank + rope, dtype=BF16), randn(batch, slots, rank + rope, seed=1, dtype=BF16)
    return q, kv, indices


@TILES
@pytest.mark.parametrize("shape", SPARSE, ids=str)
def test_sparse_mla(shape: tuple[int, ...], threads: int) -> None:
    q, kv, indices = sparse_inputs(shape)
    got = amx.sparse_mla(q, kv, indices, 0.3, shape[4])
    want = reference.sparse_mla(q.double(), kv.double(), indices, 0.3, shape[4])
    assert got.dtype == BF16
    close(got, want, rms=4e-3)
    again = amx.sparse_mla(q, kv, indices, 0.3, shape[4])
    assert torch.equal(got, again)


@TILES
def test_sparse_mla_at_the_edges() -> None:
    """No valid slot: 0. NaN in a row that is not selected: nothing. NaN, inf and very large logits: as the reference."""
    q, kv, indices = sparse_inputs((1, 6, 40, 4, 64, 32, 20))
    indices = indices.clamp(0, 30)
    indices[0, 0] = -1
    kv[0, 31:] = torch.nan
    kv[0, 0, 3], kv[0, 1, 5] = torch.nan, torch.inf
    indices[0, 1:4] = indices[0, 1:4].clamp(2)
    indices[0, 4, 0], indices[0, 5] = 0, indices[0, 5].clamp(1)
    q[0, 3] *= 200  # logits of some thousands
    got, want = amx.sparse_mla(q, kv, indices, 1.0, 64), reference.sparse_mla(q.float(), kv.float(), indices, 1.0, 64)
    assert torch.equal(got[0, 0], torch.zeros(4, 64, dtype=BF16))
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got[0, 1:4].float(), want[0, 1:4], rtol=0.02, atol=0.02)


@TILES
@pytest.mark.parametrize("shape", INDEXER, ids=str)
@pytest.mark.parametrize("budget_mb", [0, 64], ids=["query by query", "tiles"])
def test_lightning_indexer_with_ties(shape: tuple[int, ...], budget_mb: int, threads: int) -> None:
    """Small integers: every order of summation gives the same score, and equal scores are common."""
    batch, queries, slots, heads, width, topk = shape
    q, k = small_ints(batch, queries, heads, width, dtype=BF16), small_ints(batch, slots, width, seed=1, dtype=BF16)
    weights, (begin, end) = small_ints(batch, queries, heads, seed=2), ranges(batch, queries, slots)
    got = amx.lightning_indexer(q, k, weights, begin, end, topk, budget_mb)
    assert torch.equal(got, reference.lightning_indexer(q, k, weights, begin, end, topk))


@TILES
def test_lightning_indexer_picks_the_best_scores() -> None:
    q, k, weights = randn(1, 40, 8, 64, dtype=BF16), randn(1, 500, 64, seed=1, dtype=BF16), randn(1, 40, 8, seed=2)
    begin, end = causal(1, 40, past=460)
    got = amx.lightning_indexer(q, k, weights.float(), begin, end, 32, 64).long()
    scores = (weights.unsqueeze(-1) * (q.double() @ k.double().mT.unsqueeze(1)).relu()).sum(2)
    scores = scores.masked_fill(torch.arange(500) >= end.unsqueeze(-1), -torch.inf)
    close(scores.gather(-1, got).sort(descending=True).values, scores.topk(32).values, atol=1e-4)


# A key of width 1 under q = w = 1 scores itself, if it is positive: any row of scores can be made.
EXACT = st.sampled_from([0.0, 1.0, 2.0, 3e38, 1e-30, 0.25, float("inf"), float("nan"), 1.0078125])


@TILES
@settings(max_examples=150, deadline=None)
@given(st.lists(EXACT, min_size=1, max_size=200), st.integers(1, 64), st.sampled_from([1.0, -1.0]), st.data())
def test_selection_is_a_stable_sort(values: list[float], topk: int, sign: float, data: st.DataObject) -> None:
    k = torch.tensor(values).to(BF16).view(1, -1, 1)
    begin = torch.tensor([[data.draw(st.integers(-2, len(values)))]])
    end = torch.tensor([[data.draw(st.integers(-2, len(values) + 2))]])
    q, weights = torch.ones(1, 1, 1, 1, dtype=BF16), torch.full((1, 1, 1), sign)
    want = reference.lightning_indexer(q, k, weights, begin, end, topk)
    assert torch.equal(amx.lightning_indexer(q, k, weights, begin, end, topk, 64), want)


@pytest.mark.parametrize("shape", [(2, 5, 40, 3, 8, 4, 7), (1, 3, 300, 16, 64, 16, 255)], ids=str)
def test_without_it_torch_gives_the_same(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv, indices = sparse_inputs(shape)
    weights, (begin, end) = small_ints(*q.shape[:3], seed=2), ranges(*q.shape[:2], kv.shape[1])
    exact = small_ints(*q.shape, dtype=BF16), small_ints(*kv.shape, seed=1, dtype=BF16), weights, begin, end, 9
    with_it = cpu.sparse_mla(q, kv, indices, 0.3, shape[4]), cpu.lightning_indexer(*exact)
    monkeypatch.setattr(amx, "_load", lambda: (None, "not here"))
    assert not amx.usable(q)
    close(cpu.sparse_mla(q, kv, indices, 0.3, shape[4]), with_it[0], rms=4e-3)
    assert torch.equal(cpu.lightning_indexer(*exact), with_it[1])


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source(tmp_path: Path, text: str) -> list[Path]:
    (tmp_path / "two.cpp").write_text(text)
    return [tmp_path / "two.cpp"]


def test_a_library_is_built_once(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, flags = source(tmp_path, 'extern "C" int two() { return 2; }'), ("-shared", "-fPIC")
    built = build_library("two", files, flags)
    assert ctypes.CDLL(str(built)).two() == 2
    written = built.stat().st_mtime_ns
    assert build_library("two", files, flags) == built
    assert built.stat().st_mtime_ns == written
    assert build_library("two", source(tmp_path, 'extern "C" int two() { return 3; }'), flags) != built
    assert {path.name for path in empty_cache.rglob("*") if path.is_file()} == {"libtwo.so", "libtwo.so.sha256"}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda built: built.write_bytes(b""),
    "cut": lambda built: os.truncate(built, built.stat().st_size // 2),
    "changed": lambda built: built.write_bytes(built.read_bytes()[:-1] + b"!"),
    "gone": lambda built: built.unlink(),
    "no-digest": lambda built: built.with_name("libtwo.so.sha256").unlink(),
    "other-digest": lambda built: built.with_name("libtwo.so.sha256").write_text("0" * 64),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_that_is_not_whole_is_built_again(damage: str, empty_cache: Path, tmp_path: Path) -> None:
    files, flags = source(tmp_path, 'extern "C" int two() { return 2; }'), ("-shared", "-fPIC")
    built = build_library("two", files, flags)
    DAMAGES[damage](built)
    again = build_library("two", files, flags)
    assert again == built
    assert ctypes.CDLL(str(shutil.copy(again, tmp_path / "copy.so"))).two() == 2
    assert built.stat().st_mode & 0o777


@pytest.mark.parametrize("folder", ["cache/native", "cache"])
def test_a_library_that_others_may_have_put_there_is_not_loaded(folder: str, empty_cache: Path, tmp_path: Path) -> None:
    """Digest and all: whoever may write the library may write its digest too."""
    files = source(tmp_path, 'extern "C" int two() { return 2; }')
    build_library("two", files, ("-shared", "-fPIC"))
    (tmp_path / folder).chmod(0o777)
    with pytest.raises(BuildError, match=f"{folder}: others may write to it"):
        build_library("two", files, ("-shared", "-fPIC"))


def test_what_the_compiler_refuses(empty_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot compile libtwo\.so: .*error") as caught:
        build_library("two", source(tmp_path, "int two() { return nosuch; }"), ("-shared", "-fPIC"))
    assert len(str(caught.value).splitlines()) == 1
    assert not [path for path in empty_cache.rglob("*") if path.is_file()]


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        BuildError, match=r"no C\+\+ compiler \(g\+\+, c\+\+, clang\+\+\) on the PATH; install one, or set CXX"
    ):
        native_build.compiler()
    monkeypatch.setenv("CXX", "nosuch")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \(nosuch\)"):
        native_build.compiler()
