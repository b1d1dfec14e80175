"""The float8 kernels in the interpreter: bit for bit where they round, within 3e-3 of the dequantised where they sum."""

from __future__ import annotations

import pytest
import torch
from comparing import close
from gpu_cases import FORMS, Target, selection
from op_samples import randn, ranges, small_ints
from torch import Tensor

from mla2dsa.kernels import reference, reference_fp8
from mla2dsa.kernels.gpu import dispatch
from mla2dsa.kernels.gpu.programs.indexer_program import IndexerCase

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy, in the interpreter
INTERPRETER = Target("cpu", 0)
BOTH_FORMS = pytest.mark.parametrize("form", FORMS)


def rows(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Usual rows, and rows of zeros, of tiny and huge numbers, with NaN and with inf."""
    x = randn(9, width, dtype=torch.float32)
    x[1], x[2], x[3], x[4] = 0, x[2] * 1e-36, x[3] * 1e-41, x[4] * 3e37
    x[5, 0], x[6, width // 2], x[7, -1] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


@pytest.mark.parametrize("ue8m0", [False, True], ids=["float32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 33, 128])
def test_quantised_rows_bit_for_bit(width: int, dtype: torch.dtype, ue8m0: bool) -> None:
    x = rows(width, dtype)
    values, scales = dispatch.quantize_fp8_rows(x, ue8m0)
    want_values, want_scales = reference_fp8.quantize_fp8_rows(x, ue8m0)
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.isnan(), want_values.isnan())
    usual = ~values.isnan()
    assert torch.equal(values.view(torch.uint8)[usual], want_values.view(torch.uint8)[usual])


def test_rows_of_any_shape() -> None:
    x = randn(2, 3, 4, 16, dtype=torch.float32)
    values, scales = dispatch.quantize_fp8_rows(x.transpose(0, 2), False)
    assert values.shape == (4, 3, 2, 16)
    assert torch.equal(scales, reference_fp8.quantize_fp8_rows(x, False)[1].transpose(0, 2))
    assert dispatch.quantize_fp8_rows(x[:0], True)[1].shape == (0, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_bit_for_bit(dtype: torch.dtype) -> None:
    kv = rows(576, dtype)[[0, 1, 2, 3, 4, 8]].view(2, 3, 576)
    assert torch.equal(dispatch.pack_latent_fp8(kv), reference_fp8.pack_latent_fp8(kv))


@BOTH_FORMS
@pytest.mark.parametrize(
    "shape", [(2, 9, 37, 3, 40), (1, 1, 1, 1, 32), (1, 3, 50, 16, 128), (1, 2, 40, 64, 96)], ids=str
)
def test_indexer_scores(form: str, shape: tuple[int, ...]) -> None:
    batch, queries, slots, heads, width = shape
    q, q_scale = reference_fp8.quantize_fp8_rows(randn(batch, queries, heads, width), False)
    k, k_scale = reference_fp8.quantize_fp8_rows(randn(batch, slots, width, seed=1), True)
    weights, (begin, end) = (
        randn(batch, queries, heads, seed=2).float() * q_scale,
        ranges(batch, queries, slots, seed=9),
    )
    begin[0, 0], end[0, 0] = 0, slots
    inside = reference.in_range(begin, end, slots)
    want = reference.index_scores(q.double(), k.double() * k_scale.unsqueeze(-1), weights).masked_fill(~inside, 0)
    got = INTERPRETER.scores(q, k, weights, begin, end, form, k_scale).masked_fill(~inside, 0)
    close(got, want, rms=1e-6)  # the interpreter sums in float32; a GPU's tensor cores do not quite


@BOTH_FORMS
@pytest.mark.parametrize("dtype", ["fp8e4nv", "bf16"])
def test_indexer_slots(form: str, dtype: str) -> None:
    """Small integers are exact in e4m3, and in bfloat16, which stands in for it where it is missing."""
    q, k, weights = small_ints(2, 7, 5, 40), small_ints(2, 83, 40, seed=1), small_ints(2, 7, 5, seed=2)
    k_scale = 2.0 ** small_ints(2, 83, seed=3)
    begin, end = ranges(2, 7, 83)
    want = reference_fp8.lightning_indexer_fp8(
        q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn), k_scale, weights, begin, end, 13
    )
    cast = torch.float8_e4m3fn if dtype == "fp8e4nv" else torch.bfloat16
    program = IndexerCase(dtype, 5, 40, 13, 0, form, True).program()
    assert torch.equal(INTERPRETER.run(program, q.to(cast), k.to(cast), k_scale, weights, begin, end), want)


@BOTH_FORMS
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("heads", [1, 20, 40])
def test_sparse_mla_equals_the_dequantised_reference(form: str, native: bool, heads: int) -> None:
    q = randn(1, 3, heads, 576, dtype=torch.bfloat16)
    packed = reference_fp8.pack_latent_fp8(randn(1, 40, 576, seed=1, dtype=torch.bfloat16))
    indices = selection(1, 3, 40, 37)
    got = INTERPRETER.sparse_fp8(q, packed, indices, 0.07, form, native)
    close(got, reference_fp8.sparse_mla_fp8(q.double(), packed, indices, 0.07), rms=3e-3)
    assert bool((got[:, 0] == 0).all())


@pytest.mark.parametrize("native", [True, False])
def test_every_e4m3_code_is_read_right(native: bool) -> None:
    """One slot selected: the result is its row."""
    packed = torch.zeros(1, 2, 656, dtype=torch.uint8)
    packed[0, 1, :512] = torch.arange(256, dtype=torch.uint8).repeat(2)
    packed[0, 1, 512:528] = torch.tensor([1.0, 2.0, 0.5, 1.0]).view(torch.uint8)
    q = torch.zeros(1, 1, 1, 576, dtype=torch.bfloat16)
    got = INTERPRETER.sparse_fp8(q, packed, torch.ones(1, 1, 1, dtype=torch.int32), 1.0, "prefill", native)[0, 0, 0]
    want = reference_fp8.unpack_latent_fp8(packed, torch.bfloat16)[0, 1, :512]
    assert int(want.isnan().sum()) == 4  # 0x7F and 0xFF
    assert bool(got.isnan().all())  # 0 * NaN in the logits, as in the reference
    packed[0, 1, :512][want.isnan()] = 0
    got = INTERPRETER.sparse_fp8(q, packed, torch.ones(1, 1, 1, dtype=torch.int32), 1.0, "prefill", native)[0, 0, 0]
    assert torch.equal(got, want.nan_to_num(0))


@BOTH_FORMS
def test_rows_that_are_not_selected_may_hold_anything(form: str) -> None:
    q = randn(1, 1, 3, 576, dtype=torch.bfloat16)
    packed = reference_fp8.pack_latent_fp8(randn(1, 12, 576, seed=1, dtype=torch.bfloat16))
    indices = torch.tensor([[[7, -1, 9, 40, 11] * 4]], dtype=torch.int32)
    want = INTERPRETER.sparse_fp8(q, packed, indices, 0.2, form)
    unused = torch.ones(12, dtype=torch.bool)
    unused[[7, 9, 11]] = False
    packed[:, unused] = 0xFF  # NaN, read as any of the three types
    assert torch.equal(INTERPRETER.sparse_fp8(q, packed, indices, 0.2, form), want)
