"""The tests' own comparison of tensors: it passes what is close, and says of the rest where the worst of it lies."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from comparing import close, compare
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

NAN, INF = math.nan, math.inf
WANTED = torch.tensor([[1.0, -2.0, 4.0], [0.0, 8.0, -16.0]])


def changed(*changes: tuple[int, int, float]) -> Tensor:
    got = WANTED.clone()
    for row, column, value in changes:
        got[row, column] = value
    return got


@pytest.mark.parametrize(
    ("got", "limits"),
    [
        (changed(), {}),
        (changed((0, 0, 1.5)), {"atol": 0.5}),
        (changed((1, 1, 8.5), (1, 2, -17.0)), {"rtol": 0.0625}),
        (changed((1, 0, 0.15)), {"of_max": 0.01}),
        (changed((1, 2, -17.0)), {"rms": 0.06}),
        (changed((0, 0, 1.5)), {"rtol": 0.25, "atol": 0.25}),
    ],
    ids=["the same", "atol", "rtol", "of_max", "rms", "both"],
)
def test_what_is_close_passes(got: Tensor, limits: dict[str, float]) -> None:
    close(got, WANTED, **limits)


REFUSED: dict[str, tuple[Tensor, dict[str, Any], str]] = {
    "exact": (
        changed((0, 1, -2.5), (1, 2, -20.0)), {},
        "logits: 2 of 6 values differ; worst at [1, 2]: got -20, expected -16 (error 4, relative 0.25); "
        "relative RMS 0.2183 (rtol 0, atol 0)",
    ),
    "atol": (changed((0, 0, 1.51)), {"atol": 0.5}, "logits: 1 of 6 values differ; worst at [0, 0]: got 1.50999999, expected 1"),
    "rtol": (
        changed((0, 0, 1.25), (1, 2, -19.0)), {"rtol": 0.2},  # the larger error is within its tolerance
        "logits: 1 of 6 values differ; worst at [0, 0]: got 1.25, expected 1 (error 0.25, relative 0.25)",
    ),
    "of_max": (changed((1, 0, 0.17)), {"of_max": 0.01}, "worst at [1, 0]: got 0.170000002, expected 0 (error 0.17, relative infinite)"),
    "rms": (changed((1, 2, -18.0)), {"rms": 0.1}, "relative RMS 0.108, expected a relative RMS of at most 0.1"),
    "nan got": (
        changed((0, 2, NAN), (1, 1, NAN)), {"atol": 1e9},
        "NaN: 2 got, 0 expected; 2 not finite where they should be, or otherwise, first at [0, 2]: got nan, expected 4.0",
    ),
    "nan got, by rms": (changed((0, 2, NAN)), {"rms": 1e9}, "NaN: 1 got, 0 expected"),
    "nan first": (
        changed((0, 0, NAN), (1, 1, 9.0)), {},
        "2 of 6 values differ; worst at [1, 1]: got 9, expected 8 (error 1, relative 0.125); relative RMS",
    ),
    "nothing but nan": (torch.full_like(WANTED, NAN), {}, "logits: 6 of 6 values differ; NaN: 6 got, 0 expected; 6 not finite"),
    "infinite got": (changed((0, 2, INF)), {"atol": 1e9}, "infinite: 1 got, 0 expected"),
    "infinite got, by rms": (changed((0, 2, -INF)), {"rms": 1e9}, "first at [0, 2]: got -inf, expected 4.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_close_says_where(name: str) -> None:
    got, limits, message = REFUSED[name]
    with pytest.raises(AssertionError, match=re.escape(message).replace("0\\.2183", "0\\.2\\d*")):
        close(got, WANTED, name="logits", **limits)


@pytest.mark.parametrize("limits", [{"atol": 1e9}, {"rms": 1e9}, {"of_max": 1e9}, {"rtol": 1e9}], ids=str)
@pytest.mark.parametrize(
    ("got", "wanted"),
    [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, -INF), (NAN, INF), (INF, NAN), (NAN, NAN)],
)
def test_no_tolerance_covers_what_is_not_finite(got: float, wanted: float, limits: dict[str, float]) -> None:
    with pytest.raises(AssertionError, match="1 not finite where they should be"):
        close(torch.tensor([3.0, got]), torch.tensor([3.0, wanted]), **limits)


def test_equal_infinities_are_equal_and_nan_where_asked() -> None:
    close(torch.tensor([INF, -INF, 1.0]), torch.tensor([INF, -INF, 1.0]))
    close(torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.0]), equal_nan=True)
    with pytest.raises(AssertionError, match="NaN: 1 got, 1 expected"):
        close(torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN]), equal_nan=True)


def test_shapes_are_compared_and_nothing_is_no_proof() -> None:
    with pytest.raises(AssertionError, match=r"x: got \[2, 3\], expected \[3, 2\]"):
        close(WANTED, WANTED.T, name="x", atol=1e9)
    with pytest.raises(AssertionError, match="x: there is nothing to compare"):
        close(torch.empty(0, 3), torch.empty(0, 3), name="x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, torch.bool], ids=str)
def test_any_type_is_compared_in_float64(dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1]).to(dtype)
    close(values, values.double())
    with pytest.raises(AssertionError, match=r"1 of 3 values differ; worst at \[2\]: got 1, expected 0"):
        close(values, torch.tensor([0, 1, 0]))


def test_both_parts_of_a_complex_number_are_compared() -> None:
    wanted = torch.tensor([1 + 1j, 2])
    close(wanted, wanted)
    close(wanted.real, torch.tensor([1 + 0j, 2]))
    with pytest.raises(AssertionError, match=r"1 of 4 values differ; worst at \[0, 1\]: got -1, expected 1 "):
        close(wanted.conj(), wanted)


def test_a_single_number_is_compared() -> None:
    close(torch.tensor(2.0), torch.tensor(2.0))
    with pytest.raises(AssertionError, match=r"worst at \[\]: got 2, expected 3"):
        close(torch.tensor(2.0), torch.tensor(3.0))


def test_an_error_where_nothing_was_wanted_is_infinite() -> None:
    assert compare(torch.tensor([0.0, 1.0]), torch.zeros(2)).rms == INF
    assert compare(torch.zeros(2), torch.zeros(2)).rms == 0.0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    values=st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, -3.0, 1e-3, NAN, INF, -INF])] * 2), min_size=1, max_size=6),
    rtol=st.sampled_from([0.0, 0.5]), atol=st.sampled_from([0.0, 2.0]), equal_nan=st.booleans(),
)  # fmt: skip
def test_the_verdict_is_that_of_torch(
    values: list[tuple[float, float]], rtol: float, atol: float, equal_nan: bool
) -> None:
    got, wanted = torch.tensor(values, dtype=torch.float64).unbind(-1)
    expected = torch.allclose(got, wanted, rtol, atol, equal_nan)
    assert (compare(got, wanted, rtol, atol, equal_nan).wrong == 0) == expected


@pytest.mark.parametrize("offset", [0, 1, -1], ids=str)
def test_integers_that_float64_cannot_hold_are_told_apart(offset: int) -> None:
    large = torch.tensor([2**53, 7])
    assert compare(large + torch.tensor([offset, 0]), large).wrong == abs(offset)
