"""The plugin library on the GPU of this machine, called as TensorRT calls it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from plugin_harness import Harness
from torch import Tensor

from mla2dsa.kernels.gpu.binaries.bundle import bundled, write_bundle
from mla2dsa.kernels.gpu.binaries.cache import compile_cached
from mla2dsa.kernels.gpu.binaries.manifest import kernel_name
from mla2dsa.kernels.gpu.launch import DTYPES
from mla2dsa.kernels.gpu.programs.op_program import OpProgram
from mla2dsa.kernels.gpu.programs.plugin_text import write_op


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
