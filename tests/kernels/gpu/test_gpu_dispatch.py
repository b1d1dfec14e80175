"""The ops with the Triton kernels behind them, in the interpreter; the float8 ops as torch sees them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from gpu_cases import selection
from op_samples import causal, op_samples, randn, ranges, small_ints
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.kernels import choice, ops, reference, reference_fp8
from mla2dsa.kernels.gpu import dispatch
from mla2dsa.kernels.gpu.triton_code import registry

OPS = torch.ops.mla2dsa


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv(ops.KERNELS_ENV, "triton")


def fp8_samples() -> dict[str, tuple[Any, ...]]:
    begin, end = causal(2, 5, past=4)
    q, _ = reference_fp8.quantize_fp8_rows(randn(2, 5, 3, 16), False)
    k, k_scale = reference_fp8.quantize_fp8_rows(randn(2, 9, 16, seed=1), False)
    kv = randn(1, 9, 576, seed=1, dtype=torch.bfloat16)
    return {
        "quantize_fp8_rows": (randn(3, 4, 8, dtype=torch.float32), True),
        "lightning_indexer_fp8": (q, k, k_scale, randn(2, 5, 3, dtype=torch.float32), begin, end, 4),
        "pack_latent_fp8": (kv,),
        "sparse_mla_fp8": (
            randn(1, 3, 2, 576, dtype=torch.bfloat16),
            reference_fp8.pack_latent_fp8(kv),
            selection(1, 3, 9, 5),
            0.1,
        ),
    }


def opcheck(name: str, sample: tuple[Any, ...]) -> None:
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if (
        name != "lightning_indexer_fp8"
    ):  # the check of the schema computes with the inputs, which torch has not for float8
        checks.append("test_schema")
    torch.library.opcheck(getattr(OPS, name).default, sample, test_utils=checks)


@pytest.mark.parametrize("name", fp8_samples())
def test_opcheck(name: str) -> None:
    opcheck(name, fp8_samples()[name])


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("name", ["lightning_indexer", "sparse_mla", "cache_write", *fp8_samples()])
def test_opcheck_of_the_kernels(name: str) -> None:
    sample = {**op_samples(), **fp8_samples()}[name]
    opcheck(name, sample)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("queries", [1, 7, 200])  # one of each form
def test_ops_run_the_kernels(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = small_ints(2, queries, 3, 36), small_ints(2, 50, 36, seed=1)
    weights, (begin, end) = small_ints(2, queries, 3, seed=2, dtype=torch.bfloat16), ranges(2, queries, 50)
    want = reference.lightning_indexer(q, k, weights, begin, end, 9)
    attended = reference.sparse_mla(q, k, want, 0.3, 20)
    monkeypatch.setattr(reference, "lightning_indexer", lambda *_: pytest.fail("the reference ran"))
    monkeypatch.setattr(reference, "sparse_mla", lambda *_: pytest.fail("the reference ran"))
    indices = ops.lightning_indexer(q, k, weights, begin, end.to(torch.int32), 9)
    assert torch.equal(indices, want)
    torch.testing.assert_close(ops.sparse_mla(q, k, indices, 0.3, 20), attended)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("slots", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("width", [1, 36, 64])
def test_cache_write_runs_the_kernel(width: int, slots: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots below and above the cache write nothing; the cache that went in stays as it was."""
    cache, new = randn(2, 9, width), randn(2, 5, width, seed=1, dtype=torch.bfloat16)
    where = torch.tensor([[8, 0, -1, 9, 4], [3, 2, 1, 2**30, -(2**31)]], dtype=slots)
    cache = cache.to(torch.bfloat16)
    want, before = reference.cache_write(cache, new, where), cache.clone()
    monkeypatch.setattr(reference, "cache_write", lambda *_: pytest.fail("the reference ran"))
    assert torch.equal(ops.cache_write(cache, new, where), want)
    assert torch.equal(cache, before)


@pytest.mark.usefixtures("triton_kernels")
def test_strided_inputs() -> None:
    q, k, weights = small_ints(4, 2, 3, 8), small_ints(8, 30, 2), small_ints(3, 4, 2)
    q, k, weights = q.permute(1, 0, 2, 3), k.permute(2, 1, 0), weights.permute(2, 1, 0)
    begin, end = torch.zeros(1, 1, dtype=torch.int32).expand(2, 4), torch.full((4, 2), 30).T
    dense = [x.contiguous() for x in (q, k, weights, begin, end)]
    indices = ops.lightning_indexer(q, k, weights, begin, end, 5)
    assert torch.equal(indices, reference.lightning_indexer(*dense, 5))
    wide = indices.repeat_interleave(2, -1)[..., ::2]
    torch.testing.assert_close(ops.sparse_mla(q, k, wide, 0.2, 6), reference.sparse_mla(q, k, indices, 0.2, 6))


@pytest.mark.usefixtures("triton_kernels")
def test_inputs_that_do_not_start_at_16_bytes() -> None:
    q, kv = randn(1 + 2 * 3 * 20).float()[1:].view(1, 2, 3, 20), randn(3 + 9 * 20).float()[3:].view(1, 9, 20)
    indices = selection(1, 2, 9, 5)
    torch.testing.assert_close(ops.sparse_mla(q, kv, indices, 0.2, 16), reference.sparse_mla(q, kv, indices, 0.2, 16))


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(("batch", "queries", "slots"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_tensors(batch: int, queries: int, slots: int) -> None:
    q, k, weights = (torch.zeros(shape) for shape in ((batch, queries, 2, 8), (batch, slots, 8), (batch, queries, 2)))
    bound = torch.zeros(batch, queries, dtype=torch.int64)
    indices = ops.lightning_indexer(q, k, weights, bound, bound, 3)
    assert indices.shape == (batch, queries, min(3, slots))
    assert ops.sparse_mla(q, k, indices, 1.0, 8).shape == (batch, queries, 2, 8)


@pytest.mark.usefixtures("triton_kernels")
def test_float64_runs_the_reference() -> None:
    sample = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in op_samples()["sparse_mla"]
    )
    assert torch.equal(OPS.sparse_mla(*sample), reference.sparse_mla(*sample))
    sample = (*op_samples()["lightning_indexer"][:2], randn(2, 5, 3), *op_samples()["lightning_indexer"][3:])
    assert torch.equal(OPS.lightning_indexer(*sample), reference.lightning_indexer(*sample))


@pytest.mark.usefixtures("triton_kernels")
def test_exported_graph_runs_the_kernels() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, weights: Tensor, begin: Tensor, end: Tensor) -> Tensor:
            return OPS.sparse_mla(q, k, OPS.lightning_indexer(q, k, weights, begin, end, 4), 0.3, 8)

    def inputs(batch: int, queries: int, slots: int) -> tuple[Tensor, ...]:
        ends = causal(batch, queries, past=slots - queries)
        ints = small_ints(batch, queries, 2, 12), small_ints(batch, slots, 12), small_ints(batch, queries, 2)
        return (*ints, *ends)

    b, t, s = (torch.export.Dim(name) for name in ("batch", "queries", "slots"))
    dims = ({0: b, 1: t}, {0: b, 1: s}, {0: b, 1: t}, {0: b, 1: t}, {0: b, 1: t})
    program = torch.export.export(Layer(), inputs(2, 5, 9), dynamic_shapes=dims)
    for sizes in [(1, 1, 2), (3, 7, 40)]:
        assert torch.equal(program.module()(*inputs(*sizes)), Layer()(*inputs(*sizes)))


def test_without_triton_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, package: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(registry, "import_module", missing)
    with pytest.raises(UserError, match=r"need triton, which does not load here \(No module named 'triton'\): install"):
        registry.jit_function("topk_row")


@pytest.mark.parametrize(("device", "name"), [("cpu", "cpu"), ("cuda", "dispatch"), ("xpu", "reference")])
def test_kernels_by_device(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = importlib.import_module("mla2dsa.kernels.cpu")
    monkeypatch.delenv(choice.KERNELS_ENV, raising=False)
    assert choice.kernels_for(torch.device(device), cpu, reference).__name__.endswith(f".{name}")
    monkeypatch.setenv(choice.KERNELS_ENV, "reference")
    assert choice.kernels_for(torch.device(device), cpu, reference) is reference


def test_gpu_that_is_too_old_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_usable", lambda _: False)
    sample = op_samples()["sparse_mla"]
    assert torch.equal(dispatch.sparse_mla(*sample), reference.sparse_mla(*sample))


def replaced(name: str, position: int, value: Any) -> tuple[Any, ...]:
    args = fp8_samples()[name]
    return (*args[:position], value, *args[position + 1 :])


FLOAT8 = torch.float8_e4m3fn
BAD = [
    ("quantize_fp8_rows", 0, torch.tensor(1.0), "x must have at least one dim"),
    ("quantize_fp8_rows", 0, torch.zeros(3, 0), "x has rows without channels"),
    ("quantize_fp8_rows", 0, torch.zeros(3, 4, dtype=torch.int32), "x is torch.int32"),
    ("lightning_indexer_fp8", 0, torch.zeros(2, 5, 3, 16), "q is torch.float32, expected one of torch.float8_e4m3fn"),
    ("lightning_indexer_fp8", 1, torch.zeros(2, 9, 8).to(FLOAT8), "k has shape .2, 9, 8., its dim 2 must be 16"),
    ("lightning_indexer_fp8", 2, torch.zeros(2, 8), "k_scale has shape .2, 8., its dim 1 must be 9"),
    ("lightning_indexer_fp8", 2, torch.zeros(2, 9).double(), "k_scale is torch.float64"),
    ("lightning_indexer_fp8", 3, torch.zeros(2, 5, 4), "weights has shape"),
    ("lightning_indexer_fp8", 4, torch.zeros(2, 4, dtype=torch.int32), "key_begin has shape"),
    ("lightning_indexer_fp8", 6, 0, "topk must be positive, got 0"),
    ("pack_latent_fp8", 0, torch.zeros(1, 9, 575), "a row of kv must have 576 channels"),
    ("sparse_mla_fp8", 0, torch.zeros(1, 3, 2, 512), "a head of q must have 576 channels"),
    ("sparse_mla_fp8", 1, torch.zeros(1, 9, 576, dtype=torch.uint8), "a row of kv_packed must have 656 bytes"),
    ("sparse_mla_fp8", 1, torch.zeros(1, 9, 656), "kv_packed is torch.float32, expected one of torch.uint8"),
    ("sparse_mla_fp8", 2, torch.zeros(1, 2, 5, dtype=torch.int32), "indices has shape"),
]


@pytest.mark.parametrize(("name", "position", "value", "message"), BAD, ids=[f"{n}-{p}-{m[:24]}" for n, p, _, m in BAD])
def test_bad_argument_is_named(name: str, position: int, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(OPS, name)(*replaced(name, position, value))
