"""Attention of a prefill in per-head form: what the absorbed form gives, wherever it is taken, and taken where it is less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, small_conversion
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mla2dsa.kernels import native_ops, ops
from mla2dsa.optimizer.model.cached_model import open_torch_session
from mla2dsa.optimizer.proof.tasks.sessions import Variants
from mla2dsa.runtime.generation import prefill
from mla2dsa.runtime.tiled import expanded
from mla2dsa.runtime.torch_session import TorchSession

NOPE, ROPE, VALUE, RANK = 12, 8, 16, 24
SCALE = 0.3


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given_to(
    batch: int, heads: int, tokens: int, slots: int, topk: int, dtype: torch.dtype = torch.float32, past: int = 0
) -> tuple[Any, ...]:
    """Arguments of `attend`: queries behind `past` tokens, in caches that are larger."""
    up = normal(heads, NOPE + VALUE, RANK, dtype=dtype, seed=4)
    end = (past + torch.arange(tokens) + 1).clamp(max=slots).expand(batch, -1)
    begin = (torch.arange(batch)[:, None] * 2).expand(-1, tokens)  # padded on the left
    indices = ops.lightning_indexer(
        normal(batch, tokens, 2, 16),
        normal(batch, slots, 16, seed=1),
        normal(batch, tokens, 2, seed=2).abs(),
        begin,
        end,
        topk,
    )
    return (
        normal(batch, heads, tokens, NOPE, dtype=dtype), normal(batch, heads, tokens, ROPE, dtype=dtype, seed=5),
        normal(batch, slots, RANK + ROPE, dtype=dtype, seed=6), indices, up[:, :NOPE], up[:, NOPE:].mT, SCALE,
    )  # fmt: skip


def absorbed(
    q_nope: Tensor, q_rope: Tensor, kv: Tensor, indices: Tensor, up: Tensor, down: Tensor, scale: float
) -> Tensor:
    rows = torch.cat([q_nope @ up, q_rope], -1).transpose(1, 2)
    return ops.sparse_mla(rows, kv, indices, scale, RANK).transpose(1, 2) @ down


@settings(deadline=None)
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 20), tokens=st.integers(1, 9), more=st.integers(0, 9), topk=st.integers(1, 12),
    past=st.integers(0, 9),
)  # fmt: skip
def test_it_is_the_absorbed_form(batch: int, heads: int, tokens: int, more: int, topk: int, past: int) -> None:
    """Rows without any key, which give 0, among them."""
    arguments = given_to(batch, heads, tokens, past + tokens + more, topk, past=past)
    torch.testing.assert_close(expanded.attend(*arguments), absorbed(*arguments), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float16, 0.004), (torch.float64, 1e-14)], ids=str
)
def test_in_other_dtypes(dtype: torch.dtype, bound: float) -> None:
    arguments = given_to(2, 4, 30, 40, 16, dtype)
    found = expanded.attend(*arguments)
    exact = absorbed(*(x.double() if getattr(x, "dtype", None) == dtype else x for x in arguments))
    assert found.dtype == dtype
    assert float((found.double() - exact).abs().max()) < bound * float(exact.abs().max())


def v2_lite(tokens: int, keys: int, topk: int = 2048, dtype: torch.dtype = torch.float32) -> bool:
    """DeepSeek-V2-Lite's widths: whether the last `tokens` queries of `keys` are expanded."""
    ends = torch.arange(keys - tokens + 1, keys + 1)[:, None]
    slots = torch.arange(min(topk, keys)) + (ends - topk).clamp(min=0)
    indices = torch.where(slots < ends, slots, -1)[None].int()
    q, kv = torch.empty(1, 1, 1, 1, dtype=dtype).expand(1, 16, tokens, 128), torch.zeros(1).expand(1, keys, 576)
    up, down = torch.empty(16, 128, 512, device="meta"), torch.empty(16, 512, 128, device="meta")
    return expanded.pays(q, kv, indices, up, down)


@pytest.mark.parametrize(
    ("tokens", "keys", "path", "dtype", "taken"),
    [
        (2048, 2048, "avx2", torch.float32, True),
        (2048, 2048, "avx512", torch.float32, True),
        (2048, 4096, "avx2", torch.float32, True),
        (2048, 8192, "avx2", torch.float32, False),
        (2048, 2048, "avx512_bf16", torch.bfloat16, False),
        (2048, 2048, "avx2", torch.bfloat16, True),
        (2048, 8192, native_ops.TORCH, torch.float32, False),
        (1, 1024, "avx2", torch.float32, False),
        (8, 1024, "portable", torch.float32, False),
    ],
)
def test_it_is_taken_where_it_is_less_work(
    tokens: int, keys: int, path: str, dtype: torch.dtype, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_ops, "taken", lambda _: path)
    assert v2_lite(tokens, keys, dtype=dtype) is taken


@pytest.mark.parametrize("forced", ["reference", "triton"])
def test_who_names_the_kernels_has_them(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_ops, "taken", lambda _: "avx2")
    assert v2_lite(2048, 2048)
    monkeypatch.setenv("MLA2DSA_KERNELS", forced)
    assert not v2_lite(2048, 2048)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_spoils_the_queries_alone_that_select_it(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked out, it would be in every sum as 0 times NaN."""
    monkeypatch.setattr(native_ops, "taken", lambda _: "avx2")
    monkeypatch.setattr(expanded, "_USUAL", 0.01)
    arguments = given_to(1, 4, 128, 128, 128)
    kv = arguments[2]
    assert expanded.pays(arguments[0], kv, *arguments[3:6])
    kv[0, 100] = bad
    assert not expanded.pays(arguments[0], kv, *arguments[3:6])
    assert expanded.pays(arguments[0][:, :, :100], kv, arguments[3][:, :100], *arguments[4:6])  # no key of theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_conversion(tmp_path_factory)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queries of every attention that was expanded."""
    tokens, attend = list[int](), expanded.attend
    monkeypatch.setattr(expanded, "attend", lambda q, *rest: tokens.append(q.shape[2]) or attend(q, *rest))
    return tokens


def logits(session: TorchSession, length: int) -> Tensor:
    return prefill(session, [torch.arange(5, 5 + length).tolist()], length)


@pytest.mark.parametrize("chunk", [64, 200, TorchSession.chunk])
def test_a_session_says_the_same_in_both_forms(
    folder: Path, chunk: int, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchSession, "chunk", chunk)
    monkeypatch.setattr(expanded, "pays", lambda *_: True)
    found = logits(open_torch_session(folder, 1, 512), 300)
    assert sum(seen) == 300 * 4
    seen.clear()
    monkeypatch.setattr(expanded, "pays", lambda *_: False)
    monkeypatch.setattr(expanded, "tile_rows", lambda *_: 100)
    torch.testing.assert_close(found, logits(open_torch_session(folder, 1, 512), 300), atol=1e-4, rtol=1e-4)
    assert seen == []


def test_a_session_takes_it_of_itself(folder: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expanded, "_USUAL", 0.01)  # of an index_topk as small as this, it would be more work
    monkeypatch.setattr(native_ops, "taken", lambda _: "avx2")
    session = open_torch_session(folder, 1, 512)
    logits(session, 300)
    assert set(seen) == {300}
    seen.clear()
    at, zero = torch.tensor([[300]]), torch.zeros(1, dtype=torch.int64)
    session.step(torch.tensor([[7]]), at, at, zero, zero)
    assert seen == []


def test_other_selections_are_left_alone(folder: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another op stands for `sparse_mla`, nothing is known of what it does."""
    monkeypatch.setattr(expanded, "pays", lambda *_: True)
    variants = Variants(folder)
    told = {name: logits(variants.session(name, 1, 512), 300) for name in ("dense", "oracle", "window")}
    assert seen == []
    torch.testing.assert_close(told["dense"], logits(open_torch_session(TINY, 1, 512), 300), atol=1e-3, rtol=1e-3)
