"""The sparse MLA kernels in the interpreter, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from comparing import close
from gpu_cases import FORMS, TOLERANCE, Target, selection
from op_samples import randn

from mla2dsa.kernels import reference

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy, in the interpreter
INTERPRETER = Target("cpu", 0)
BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
# batch, queries, slots, heads, rank, rope, selected
SHAPES = [
    (2, 3, 50, 5, 64, 16, 37),
    (1, 1, 1, 1, 32, 0, 1),
    (1, 3, 20, 16, 64, 64, 64),
    (2, 3, 30, 40, 24, 20, 16),
    (1, 3, 9, 128, 16, 4, 3),
    (1, 1, 70, 2, 256, 64, 150),
    (1, 3, 33, 16, 512, 64, 17),
]


@BOTH_FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, queries, slots, heads, rank, rope, selected = shape
    q = randn(batch, queries, heads, rank + rope, dtype=dtype)
    kv = randn(batch, slots, rank + rope, seed=1, dtype=dtype)
    indices = selection(batch, queries, slots, selected)
    if queries == 1:
        indices = indices.clamp(min=0)
    got = INTERPRETER.sparse(q, kv, indices, (rank + rope) ** -0.5, rank, form)
    want = reference.sparse_mla(q.double(), kv.double(), indices, (rank + rope) ** -0.5, rank)
    assert got.dtype == dtype
    close(got, want, rms=TOLERANCE[dtype])
    if queries > 1:
        assert bool((got[:, 0] == 0).all())  # no valid slot


@BOTH_FORMS
@pytest.mark.parametrize(("selected", "slots"), [(0, 5), (7, 0)])
def test_nothing_to_select_from_gives_zero(form: str, selected: int, slots: int) -> None:
    got = INTERPRETER.sparse(
        randn(1, 2, 3, 20).float(), randn(1, slots, 20).float(), selection(1, 2, slots, selected), 1.0, 16, form
    )
    assert got.shape == (1, 2, 3, 16)
    assert bool((got == 0).all())


@BOTH_FORMS
def test_rows_that_are_not_selected_may_hold_anything(form: str) -> None:
    q, kv = randn(1, 2, 3, 40, dtype=torch.float32), randn(1, 40, 40, seed=1, dtype=torch.float32)
    indices = torch.tensor([[[7, -1, 9, 40, 11] * 8, [-1, 8, 10, -5, 8] * 8]], dtype=torch.int32)
    want = INTERPRETER.sparse(q, kv, indices, 0.2, 32, form)
    unused = torch.ones(40, dtype=torch.bool)
    unused[[7, 8, 9, 10, 11]] = False
    kv[:, unused] = torch.nan
    assert torch.equal(INTERPRETER.sparse(q, kv, indices, 0.2, 32, form), want)


@BOTH_FORMS
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e30, -1e30], ids=str)
def test_selected_rows_that_hold_extremes(form: str, value: float) -> None:
    q, kv = randn(1, 3, 2, 36, dtype=torch.float32), randn(1, 30, 36, seed=1, dtype=torch.float32)
    kv[:, 4, 33], q[..., 33] = value, q[..., 33].abs()
    indices = selection(1, 3, 30, 40)
    indices[:, 1] = 4  # this row alone
    got, want = INTERPRETER.sparse(q, kv, indices, 0.2, 32, form), reference.sparse_mla(q, kv, indices, 0.2, 32)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)


@BOTH_FORMS
def test_large_logits_do_not_overflow(form: str) -> None:
    q, kv = randn(1, 2, 2, 36, dtype=torch.float32) * 1e4, randn(1, 30, 36, seed=1, dtype=torch.float32) * 1e4
    indices = selection(1, 2, 30, 40)
    got, want = INTERPRETER.sparse(q, kv, indices, 1.0, 32, form), reference.sparse_mla(q, kv, indices, 1.0, 32)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
