"""The plugin library on a GPU, called as TensorRT calls it, against the float64 reference; also inside of a CUDA graph.

No TensorRT is needed, only a driver: the harness and the library are those of the tests without a GPU.
"""

from __future__ import annotations

import pytest
import torch
from comparing import close
from gpu_cases import TOLERANCE, selection
from op_samples import randn
from plugin_running import Running, sm
from plugin_samples import cache_write_of
from torch import Tensor

from mla2dsa.kernels import reference
from mla2dsa.kernels.gpu.binaries.compile import ARCHITECTURES
from mla2dsa.kernels.gpu.programs.op_program import op_program, spec_of


def why_not() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return "" if 10 * major + minor in ARCHITECTURES else f"no kernels for sm_{10 * major + minor}"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is one")]
OPEN = (None, None)


CASES = [(1, 1, 8192), (1, 1, 131072), (8, 1, 32768), (150, 1, 4096), (1, 512, 8192), (2, 700, 5000), (1, 4096, 40_000)]


@pytest.mark.parametrize("graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize(("batch", "queries", "slots"), CASES)
def test_indexer(batch: int, queries: int, slots: int, graph: bool) -> None:
    """Small integers, so that scores are exact and the slots have to be the very same."""
    g = torch.Generator().manual_seed(0)

    def ints(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g).to(torch.bfloat16)

    q, k, weights = ints(batch, queries, 64, 128), ints(batch, slots, 128), ints(batch, queries, 64).float()
    end = (torch.arange(queries) + slots - queries + 1).expand(batch, -1).contiguous()
    begin = torch.zeros_like(end)
    shapes = ((*OPEN, 64, 128), (*OPEN, 128), (*OPEN, 64), OPEN, OPEN)
    op = op_program(
        spec_of("LightningIndexer"), ("bf16", "bf16", "fp32", "i64", "i64"), shapes, {"topk": 2048}, (sm(),)
    )
    got = Running(op, (q, k, weights, begin, end)).result(graph)
    few = torch.linspace(0, queries - 1, min(queries, 16)).long()  # float64 on all of them would take hours
    rows = (q[:, few].cuda().double(), k.cuda().double(), weights[:, few].cuda().double())
    want = reference.lightning_indexer(*rows, begin[:, few].cuda(), end[:, few].cuda(), 2048)
    assert torch.equal(got[:, few], want.cpu())


@pytest.mark.parametrize("graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize(("batch", "queries", "slots"), CASES)
def test_attention(batch: int, queries: int, slots: int, heads: int, graph: bool) -> None:
    q, kv = (
        randn(batch, queries, heads, 576, dtype=torch.bfloat16),
        randn(batch, slots, 576, seed=1, dtype=torch.bfloat16),
    )
    indices = selection(batch, queries, slots, 2048)
    op = op_program(
        spec_of("SparseMLA"), ("bf16", "bf16", "i32"), ((*OPEN, heads, 576), (*OPEN, 576), (*OPEN, None)),
        {"scale": 192**-0.5, "kv_lora_rank": 512}, (sm(),),
    )  # fmt: skip
    got = Running(op, (q, kv, indices)).result(graph).double()
    few = torch.linspace(0, queries - 1, min(queries, 16)).long()
    want = reference.sparse_mla(
        q[:, few].cuda().double(), kv.cuda().double(), indices[:, few].cuda(), 192**-0.5, 512
    ).cpu()
    close(got[:, few], want, rms=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("alias", [False, True], ids=["copied", "in-place"])
@pytest.mark.parametrize(("batch", "queries", "slots"), CASES)
def test_cache_write(batch: int, queries: int, slots: int, alias: bool, graph: bool) -> None:
    cache, new = (
        randn(batch, slots, 576, dtype=torch.bfloat16),
        randn(batch, queries, 576, seed=1, dtype=torch.bfloat16),
    )
    where = torch.stack([torch.randperm(slots)[:queries] for _ in range(batch)])
    where[:, 0] = slots  # outside
    want = reference.cache_write(cache, new, where)
    assert torch.equal(Running(cache_write_of(576, (sm(),)), (cache, new, where), alias).result(graph), want)
