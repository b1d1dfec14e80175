"""A stand-in for TensorRT's runtime: the same calls, answered by onnxruntime on the memory at the addresses given.

It holds a session to what TensorRT holds it to: a profile is chosen, shapes lie in it, every tensor has an address.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_ITEM = {"int64": np.int64, "float32": np.float32, "float16": np.float16}


class FakeEngine:
    """folder: an export in float32; manifest: of an engine, with its profiles."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.contexts: list[FakeContext] = []

    def create_execution_context(self) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        ort.set_default_logger_severity(3)
        file = engine.folder / "model.onnx"
        self._session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._manifest = engine.manifest
        self._inputs = {entry["name"]: entry for entry in engine.manifest["inputs"]}
        self._outputs = {entry["name"]: entry for entry in engine.manifest["outputs"]}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.profiles: list[int] = []
        self.runs = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profiles.append(index)
        return 0 <= index < len(self._manifest["profiles"])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = self._manifest["profiles"][self.profiles[-1]]
        for dim, size in zip(self._inputs[name]["shape"], shape, strict=True):
            low, _, high = limits[dim] if isinstance(dim, str) else (dim, dim, dim)
            if not low <= size <= high:
                return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._inputs or name in self._outputs

    def execute_async_v3(self, stream: int) -> bool:
        sizes = {
            dim: size
            for name, entry in self._inputs.items()
            for dim, size in zip(entry["shape"], self._shapes[name], strict=True)
        }
        feeds = {name: self._array(entry, sizes).copy() for name, entry in self._inputs.items()}
        results = self._session.run(list(self._outputs), feeds)
        for entry, result in zip(self._outputs.values(), results, strict=True):
            self._array(entry, sizes)[...] = result
        self.runs += 1
        return True

    def _array(self, entry: Mapping[str, Any], sizes: Mapping[Any, int]) -> Any:
        """The memory of a tensor, to be read or written in place."""
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in entry["shape"]]
        kind = np.dtype(_ITEM[entry["dtype"]])
        count = int(np.prod(shape))
        buffer = (ctypes.c_char * (count * kind.itemsize)).from_address(self._addresses[entry["name"]])
        return np.frombuffer(buffer, dtype=kind, count=count).reshape(shape)
