"""The top-k kernels in the interpreter: the slots that a stable sort gives, in both forms, whatever the scores are."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import FORMS, Target, score_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from op_samples import ranges
from torch import Tensor

from mla2dsa.kernels.gpu.launch import Launcher
from mla2dsa.kernels.gpu.programs.topk_program import topk_program
from mla2dsa.kernels.reference import best_slots

pytest.importorskip("triton")
INTERPRETER = Target("cpu", 0)
ROWS = score_rows(1, 4, 403)
BOTH_FORMS = pytest.mark.parametrize("form", FORMS)


def check(scores: Tensor, begin: Tensor, end: Tensor, topk: int, form: str) -> None:
    got = INTERPRETER.topk(scores, begin, end, topk, form)
    assert torch.equal(got, best_slots(scores, begin, end, topk))


def whole(scores: Tensor) -> tuple[Tensor, Tensor]:
    begin = torch.zeros(scores.shape[:2], dtype=torch.int32)
    return begin, torch.full_like(begin, scores.shape[2])


@BOTH_FORMS
@pytest.mark.parametrize("name", ROWS)
def test_equals_a_stable_sort(form: str, name: str) -> None:
    scores = ROWS[name]
    check(scores, *whole(scores), 100, form)
    check(scores, *ranges(*scores.shape), 37, form)


@BOTH_FORMS
@pytest.mark.parametrize("topk", [1, 2, 64, 401, 402, 403, 404, 5000])
def test_any_number_of_slots(form: str, topk: int) -> None:
    for name in ("normal", "many ties"):
        scores = ROWS[name][:, :2]
        check(scores, *whole(scores), topk, form)


@BOTH_FORMS
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65])
def test_any_row_length(form: str, slots: int) -> None:
    scores = ROWS["mostly zero"][..., :slots].contiguous()
    check(scores, *whole(scores), 3, form)
    check(scores, *ranges(*scores.shape, seed=slots), 3, form)


@BOTH_FORMS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ranges_at_the_limits_of_their_type(form: str, dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    scores = ROWS["normal"]
    begin = torch.tensor([[limits.min, 5, limits.max, 7]], dtype=dtype)
    end = torch.tensor([[limits.max, limits.min, limits.max, 8]], dtype=dtype)
    check(scores, begin, end, 50, form)


@BOTH_FORMS
def test_several_sequences(form: str) -> None:
    scores = ROWS["normal"].expand(3, -1, -1) * torch.tensor([1.0, -1.0, 0.0])[:, None, None]
    check(scores, *ranges(*scores.shape, seed=4), 20, form)


@BOTH_FORMS
@pytest.mark.parametrize("name", ["normal", "close together", "all equal", "many ties"])
def test_with_the_blocks_of_a_gpu(form: str, name: str) -> None:
    """Many blocks of the size that an H200 takes, several slices."""
    scores = score_rows(1, 1, 40_000)[name]
    begin, end = torch.tensor([[3]]), torch.tensor([[39_999]])
    got = Launcher(topk_program(2048, 90, form), interpret=True)(scores, begin, end)[0]
    assert torch.equal(got, best_slots(scores, begin, end, 2048))


def kinds(seed: int, slots: int, kind: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if kind == 0:  # any bits at all
        return torch.randint(-(2**31), 2**31, (1, 2, slots), generator=g).to(torch.int32).view(torch.float32)
    if kind == 1:
        return torch.randint(-2, 3, (1, 2, slots), generator=g).float()
    return torch.randn(1, 2, slots, generator=g) * 2.0 ** int(torch.randint(-20, 20, (), generator=g)) + kind - 2


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 120), st.integers(0, 12), st.sampled_from(FORMS))
def test_property_equals_a_stable_sort(seed: int, slots: int, topk: int, kind: int, form: str) -> None:
    scores = kinds(seed, slots, kind)
    check(scores, *ranges(1, 2, slots, seed=seed), topk, form)
