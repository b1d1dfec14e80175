"""The ops on a CUDA device: the interpreter's cases at real sizes, CUDA graphs, torch.compile. Skipped without a device."""

from __future__ import annotations

import pytest
import torch
from comparing import close
from gpu_cases import FORMS, TOLERANCE, Target, score_rows, selection
from op_samples import causal, randn, ranges, small_ints
from torch import Tensor

from mla2dsa.kernels import ops, ops_fp8, reference, reference_fp8
from mla2dsa.kernels.gpu.programs.indexer_program import FORMS as INDEXER_FORMS


def why_not() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"compute capability {major}.{minor}, the kernels need 8.0"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is one")]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
GPU = Target("cuda", 10 * CAPABILITY[0] + CAPABILITY[1])
BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
needs_fp8 = pytest.mark.skipif(GPU.sm < 89, reason="no float8 before compute capability 8.9")


def to_gpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(GPU.device) for tensor in tensors)


@BOTH_FORMS
@pytest.mark.parametrize("slots", [4096, 50001])
@pytest.mark.parametrize("name", score_rows(1, 1, 1))
def test_topk_equals_a_stable_sort(name: str, slots: int, form: str) -> None:
    scores = score_rows(2, 5, slots)[name]
    begin = torch.zeros(2, 5, dtype=torch.int32)
    for topk in (1, 777, 2048, 4096):
        for bounds in ((begin, torch.full_like(begin, slots)), ranges(2, 5, slots)):
            want = reference.best_slots(scores, *bounds, topk)
            assert torch.equal(GPU.topk(scores, *bounds, topk, form), want)


@BOTH_FORMS
def test_topk_of_a_million(form: str) -> None:
    for name in ("normal", "all equal", "close together", "nan and inf"):
        scores = score_rows(1, 2, 1 << 20)[name]
        begin, end = torch.tensor([[0, 77]]), torch.tensor([[1 << 20, (1 << 20) - 3]])
        want = reference.best_slots(scores, begin, end, 2048)
        assert torch.equal(GPU.topk(scores, begin, end, 2048, form), want)


@BOTH_FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [1, 8, 20, 64, 128])
@pytest.mark.parametrize("width", [64, 128])
def test_indexer_scores(form: str, width: int, heads: int, dtype: torch.dtype) -> None:
    q, k = randn(2, 77, heads, width, dtype=dtype), randn(2, 1501, width, seed=1, dtype=dtype)
    weights, (begin, end) = randn(2, 77, heads, seed=2).float(), ranges(2, 77, 1501)
    inside = reference.in_range(begin, end, 1501)
    want = reference.index_scores(*to_gpu(q.double(), k.double(), weights)).cpu().masked_fill(~inside, 0)
    got = GPU.scores(q, k, weights, begin, end, form).masked_fill(~inside, 0)
    close(got, want, rms=min(TOLERANCE[dtype], 1e-6))


@pytest.mark.parametrize("form", INDEXER_FORMS)
@pytest.mark.parametrize(
    ("batch", "queries", "slots", "heads", "topk"),
    [(1, 700, 12000, 64, 2048), (3, 5, 9001, 8, 512), (2, 1, 131072, 32, 2048)],
)
def test_indexer_slots_with_ties(form: str, batch: int, queries: int, slots: int, heads: int, topk: int) -> None:
    """Small integers: every sum is exact, whatever its order."""
    q, k = small_ints(batch, queries, heads, 128).bfloat16(), small_ints(batch, slots, 128, seed=1).bfloat16()
    weights, (begin, end) = small_ints(batch, queries, heads, seed=2), ranges(batch, queries, slots)
    begin[:, 0], end[:, 0] = 0, slots
    want = reference.lightning_indexer(*to_gpu(q, k, weights, begin, end), topk).cpu()
    for budget_mb in (512, 16):
        assert torch.equal(GPU.indexer(q, k, weights, begin, end, topk, form, budget_mb), want)


@BOTH_FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("heads", "rank", "rope"),
    [(1, 512, 64), (16, 512, 64), (20, 512, 64), (128, 512, 64), (32, 256, 64), (5, 24, 20), (8, 64, 0)],
)
def test_sparse_mla(form: str, heads: int, rank: int, rope: int, dtype: torch.dtype) -> None:
    q = randn(2, 9, heads, rank + rope, dtype=dtype)
    kv, indices = randn(2, 5000, rank + rope, seed=1, dtype=dtype), selection(2, 9, 5000, 1111)
    scale = (rank + rope) ** -0.5
    want = reference.sparse_mla(*to_gpu(q.double(), kv.double(), indices), scale, rank).cpu()
    got = GPU.sparse(q, kv, indices, scale, rank, form)
    close(got, want, rms=TOLERANCE[dtype])
    assert bool((got[:, 0] == 0).all())


@BOTH_FORMS
def test_sparse_mla_ignores_rows_that_are_not_selected(form: str) -> None:
    q, kv = randn(1, 3, 64, 576, dtype=torch.bfloat16), randn(1, 3000, 576, seed=1, dtype=torch.bfloat16)
    indices = selection(1, 3, 3000, 700)
    want = GPU.sparse(q, kv, indices, 0.1, 512, form)
    used = indices[(indices >= 0) & (indices < 3000)].unique().long()
    kv[:, torch.ones(3000, dtype=torch.bool).index_fill(0, used, False)] = torch.nan
    assert torch.equal(GPU.sparse(q, kv, indices, 0.1, 512, form), want)


@BOTH_FORMS
@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_fp8), False])
@pytest.mark.parametrize("heads", [8, 20, 64, 128])
def test_sparse_mla_fp8(form: str, native: bool, heads: int) -> None:
    q = randn(2, 5, heads, 576, dtype=torch.bfloat16)
    packed = reference_fp8.pack_latent_fp8(randn(2, 4000, 576, seed=1, dtype=torch.bfloat16))
    indices = selection(2, 5, 4000, 1111)
    want = reference_fp8.sparse_mla_fp8(*to_gpu(q.double(), packed, indices), 0.07).cpu()
    close(GPU.sparse_fp8(q, packed, indices, 0.07, form, native), want, rms=3e-3)


@needs_fp8
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_rows_bit_for_bit(dtype: torch.dtype, ue8m0: bool) -> None:
    x = (randn(3, 1000, 128).float() * 10 ** randn(3, 1000, 1, seed=1).float()).to(dtype)
    x[0, 0], x[0, 1, 5] = 0, torch.inf
    values, scales = ops_fp8.quantize_fp8_rows(x.to(GPU.device), ue8m0)
    want_values, want_scales = reference_fp8.quantize_fp8_rows(x, ue8m0)
    assert torch.equal(scales.cpu(), want_scales)
    assert torch.equal(values.cpu().view(torch.uint8), want_values.view(torch.uint8))
    kv = randn(2, 300, 576, dtype=dtype)
    assert torch.equal(ops_fp8.pack_latent_fp8(kv.to(GPU.device)).cpu(), reference_fp8.pack_latent_fp8(kv))


@pytest.mark.parametrize("queries", [1, 300])
def test_indexer_fp8(queries: int) -> None:
    q, k, weights = (
        small_ints(2, queries, 32, 128),
        small_ints(2, 7000, 128, seed=1),
        small_ints(2, queries, 32, seed=2),
    )
    k_scale = 2.0 ** small_ints(2, 7000, seed=3)
    begin, end = ranges(2, queries, 7000)
    args = (q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn), k_scale, weights, begin, end, 512)
    moved = to_gpu(*(arg for arg in args if isinstance(arg, Tensor)))
    want = reference_fp8.lightning_indexer_fp8(*moved, 512)
    assert torch.equal(ops_fp8.lightning_indexer_fp8(*moved, 512), want)


@needs_fp8
@BOTH_FORMS
def test_indexer_fp8_scores(form: str) -> None:
    q, q_scale = reference_fp8.quantize_fp8_rows(randn(1, 70, 64, 128), False)
    k, k_scale = reference_fp8.quantize_fp8_rows(randn(1, 3000, 128, seed=1), True)
    weights, (begin, end) = randn(1, 70, 64, seed=2).float() * q_scale, ranges(1, 70, 3000)
    inside = reference.in_range(begin, end, 3000)
    want = reference.index_scores(q.double(), k.double() * k_scale.unsqueeze(-1), weights).masked_fill(~inside, 0)
    got = GPU.scores(q, k, weights, begin, end, form, k_scale).masked_fill(~inside, 0)
    close(got, want, rms=3e-3)


class Layer(torch.nn.Module):
    """Indexer and attention, as the pass puts them into a graph."""

    def forward(
        self, q: Tensor, k: Tensor, weights: Tensor, begin: Tensor, end: Tensor, queries: Tensor, kv: Tensor
    ) -> Tensor:
        indices = torch.ops.mla2dsa.lightning_indexer(q, k, weights, begin, end, 256)
        return torch.ops.mla2dsa.sparse_mla(queries, kv, indices, 0.1, 512)


def layer_inputs(batch: int, queries: int, slots: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Small integers in the indexer, so that the selection does not depend on the order of sums."""
    begin, end = causal(batch, queries, past=slots - queries)
    return to_gpu(
        small_ints(batch, queries, 16, 128, seed=seed).bfloat16(),
        small_ints(batch, slots, 128, seed=seed + 1).bfloat16(),
        small_ints(batch, queries, 16, seed=seed + 2),
        begin.contiguous(),
        end.contiguous(),
        randn(batch, queries, 32, 576, seed=seed, dtype=torch.bfloat16),
        randn(batch, slots, 576, seed=seed + 1, dtype=torch.bfloat16),
    )


def layer_reference(inputs: tuple[Tensor, ...]) -> Tensor:
    indices = reference.lightning_indexer(*inputs[:5], 256)
    return reference.sparse_mla(inputs[5].double(), inputs[6].double(), indices, 0.1, 512)


@pytest.mark.parametrize("sizes", [(2, 1, 3001), (1, 200, 1000)], ids=["decode", "prefill"])
def test_cuda_graph(sizes: tuple[int, int, int]) -> None:
    static, layer = layer_inputs(*sizes), Layer()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(*static)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(*static)
    for seed in (10, 20):
        fresh = layer_inputs(*sizes, seed=seed)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        close(out, layer_reference(fresh), rms=2e-3)
        assert torch.equal(out, layer(*fresh))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile(mode: str) -> None:
    compiled = torch.compile(Layer(), fullgraph=True, mode=mode)
    for sizes in [(2, 1, 3001), (1, 200, 1000), (1, 201, 1001)]:
        inputs = layer_inputs(*sizes)
        for _ in range(3):  # a CUDA graph is recorded at the second call
            got = compiled(*inputs).clone()
        assert torch.equal(got, Layer()(*inputs))


def test_export() -> None:
    batch, queries, slots = (torch.export.Dim(name) for name in ("batch", "queries", "slots"))
    dims = ({0: batch, 1: queries}, {0: batch, 1: slots}, *[{0: batch, 1: queries}] * 4, {0: batch, 1: slots})
    program = torch.export.export(Layer(), layer_inputs(2, 5, 900), dynamic_shapes=dims)
    for sizes in [(1, 1, 2000), (3, 70, 400)]:
        inputs = layer_inputs(*sizes)
        assert torch.equal(program.module()(*inputs), Layer()(*inputs))


def test_same_result_every_time() -> None:
    inputs = layer_inputs(2, 150, 5000)
    first = Layer()(*inputs)
    assert all(torch.equal(Layer()(*inputs), first) for _ in range(5))


def test_nothing_waits_for_the_device() -> None:
    inputs = layer_inputs(1, 3, 2000)
    Layer()(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        Layer()(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_strided_and_misaligned_inputs() -> None:
    kv = randn(3 + 4000 * 576).bfloat16().to(GPU.device)[3:].view(1, 4000, 576)
    q = randn(1, 128, 4, 576, dtype=torch.bfloat16).to(GPU.device).transpose(1, 2)
    indices = selection(1, 4, 4000, 500).to(GPU.device)
    want = reference.sparse_mla(q.double(), kv.double(), indices, 0.1, 512)
    close(ops.sparse_mla(q, kv, indices, 0.1, 512), want, rms=2e-3)


def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    slots = 4_000_000
    kv = torch.zeros(1, slots, 576, dtype=torch.bfloat16, device=GPU.device)
    kv[0, -50:] = randn(50, 576, dtype=torch.bfloat16).to(GPU.device)
    q = randn(1, 2, 16, 576, dtype=torch.bfloat16).to(GPU.device)
    indices = torch.arange(slots - 50, slots, dtype=torch.int32, device=GPU.device).expand(1, 2, 50)
    want = reference.sparse_mla(q.double(), kv[:, -50:].double(), indices - (slots - 50), 0.1, 512)
    close(ops.sparse_mla(q, kv, indices, 0.1, 512), want, rms=2e-3)
    del kv
    q, weights = small_ints(18, 1, 8, 128).bfloat16().to(GPU.device), small_ints(18, 1, 8, seed=1).to(GPU.device)
    k = small_ints(1, 1 << 20, 128, seed=2).bfloat16().to(GPU.device).expand(18, -1, -1).contiguous()
    begin, end = (
        torch.zeros(18, 1, dtype=torch.int32, device=GPU.device),
        torch.full((18, 1), 1 << 20, device=GPU.device),
    )
    got = ops.lightning_indexer(q, k, weights, begin, end, 2048)[-1:]
    assert torch.equal(got, ops.lightning_indexer(q[-1:], k[-1:], weights[-1:], begin[-1:], end[-1:], 2048))
