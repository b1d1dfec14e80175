"""The plugin library on a GPU, called as TensorRT calls it, against the float64 reference; also inside of a CUDA graph.

No TensorRT is needed, only a driver: the harness and the library are those of the tests without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import test_plugin_launches as real
import torch
from gpu_cases import TOLERANCE, selection
from op_samples import randn
from plugin_harness import Harness
from torch import Tensor

from mla2dsa.kernels import reference
from mla2dsa.kernels.gpu.binaries.bundle import bundled, write_bundle
from mla2dsa.kernels.gpu.binaries.cache import compile_cached
from mla2dsa.kernels.gpu.binaries.compile import ARCHITECTURES
from mla2dsa.kernels.gpu.binaries.manifest import kernel_name
from mla2dsa.kernels.gpu.launch import DTYPES
from mla2dsa.kernels.gpu.programs.op_program import OpProgram, op_program, spec_of
from mla2dsa.kernels.gpu.programs.plugin_text import write_op


def why_not() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return "" if 10 * major + minor in ARCHITECTURES else f"no kernels for sm_{10 * major + minor}"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is one")]
OPEN = (None, None)


def plugin(op: OpProgram) -> Harness:
    """With the real driver. The stand-in must not have come first, so this runs in a process of its own (pytest -m gpu)."""
    if "MLA2DSA_LIBCUDA" in os.environ:
        pytest.skip("the stand-in for the driver is loaded in this process; run pytest -m gpu")
    made: dict[Any, dict[int, Any]] = {}
    for variant, sm in op.binaries():
        made.setdefault(variant, {})[sm] = compile_cached(variant, sm)
    kernels = {kernel_name(variant): bundled(variant, by_sm) for variant, by_sm in made.items()}
    return Harness.real(op.op, write_op(op, kernel_name).encode(), write_bundle(kernels)).attach()


class Running:
    """A plugin with its tensors on the GPU; `once` puts one run on the current stream."""

    def __init__(self, op: OpProgram, inputs: Sequence[Tensor], alias: bool = False) -> None:
        self._plugin = plugin(op)
        self._inputs = [tensor.cuda().contiguous() for tensor in inputs]
        shapes = [tuple(tensor.shape) for tensor in self._inputs]
        (kind, dims), *_ = op.outputs
        shape = tuple(size.value(shapes) for size in dims)
        self.output = self._inputs[0] if alias else torch.full(shape, -7, dtype=DTYPES[kind], device="cuda")
        self._kinds = [*(kind for kind, _ in op.inputs), kind]
        self._shapes = [*shapes, shape]
        self._plugin.shapes(self._kinds, len(shapes), self._shapes)
        size = self._plugin.workspace(self._kinds, len(shapes), self._shapes)
        self._workspace = torch.empty(max(size, 256), dtype=torch.uint8, device="cuda")

    def once(self) -> None:
        pointers = [*(tensor.data_ptr() for tensor in self._inputs), self.output.data_ptr()]
        stream = torch.cuda.current_stream().cuda_stream
        self._plugin.enqueue(self._kinds, len(self._inputs), self._shapes, pointers, self._workspace.data_ptr(), stream)

    def result(self, graph: bool) -> Tensor:
        self.once()
        torch.cuda.synchronize()
        if graph:
            self.output.fill_(-7) if self.output is not self._inputs[0] else None
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                self.once()
            captured.replay()
            torch.cuda.synchronize()
        return self.output.cpu()


def sm() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


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
    error = (got[:, few] - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error < TOLERANCE[torch.bfloat16]


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
    assert torch.equal(Running(real.cache_write_of(576, (sm(),)), (cache, new, where), alias).result(graph), want)
