"""Run an exported ONNX folder in onnxruntime, with caches bound in place: what `generate --runtime onnxruntime` uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .safetensors_index import file_digest, read_json

EXPORT_MANIFEST = "mla2dsa-export.json"
FIRST_CAPACITY = 256
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def read_export(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of an exported folder. Raises UserError when there is none, or the model is of another kind."""
    if not (folder / EXPORT_MANIFEST).is_file():
        raise UserError(f"{folder}: not an exported folder ({EXPORT_MANIFEST} missing); run `mla2dsa export` first")
    manifest = read_json(folder / EXPORT_MANIFEST)
    if manifest.get("kind") != kind:
        raise UserError(f"{folder}: holds a {manifest.get('kind')} export, this runtime takes {kind}")
    return manifest


class OrtSession:
    """A session on an exported folder. The CUDA provider is used where onnxruntime has it, the CPU's otherwise.

    A cache starts small and doubles as the sequence grows, since work grows with its length. Input and output of a cache
    are the same memory: a step writes its rows and copies nothing.
    """

    def __init__(self, folder: Path, batch: int, capacity: int | None = None, threads: int | None = None) -> None:
        self._manifest = read_export(folder, "onnx")
        limits = self._manifest["limits"]
        if batch > limits["max_batch"]:
            raise UserError(
                f"{folder}: batch {batch} is over the maximum of {limits['max_batch']} it was exported for (--max-batch)"
            )
        if capacity is not None and capacity > limits["max_seq"]:
            raise UserError(
                f"{folder}: a cache of {capacity} tokens is over the maximum of {limits['max_seq']} it was exported for (--max-seq)"
            )
        self.batch, self.capacity = batch, capacity or int(limits["max_seq"])
        self._dtype = self._supported_dtype(folder)
        _check_weight_files(folder, self._manifest)
        self._session, self._device = _open(folder / self._manifest["file"], threads)
        self._caches: dict[str, Tensor] = {}
        self._widths = {
            (part["input"], part["output"]): int(part["width"])
            for cache in self._manifest["caches"]
            for part in (cache["latent"], cache["index_key"])
        }
        self._grow(min(FIRST_CAPACITY, self.capacity))

    def _supported_dtype(self, folder: Path) -> torch.dtype:
        name = self._manifest["dtype"]
        if name not in _DTYPES:
            raise UserError(
                f"{folder}: exported as {name}, which onnxruntime cannot run; export with --dtype float32 or float16"
            )
        return _DTYPES[name]

    def step(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor, last: Tensor) -> Tensor:
        """See `exporters.generation.Session`."""
        needed = int(slots.max()) + 1
        if needed > self._length:
            self._grow(min(self.capacity, max(needed, 2 * self._length)))
        inputs = {"input_ids": ids, "position_ids": positions, "slots": slots, "key_begin": key_begin, "last": last}
        logits = torch.empty(self.batch, 1, int(self._manifest["model"]["vocab_size"]), dtype=self._dtype)
        binding = self._session.io_binding()
        kept = [self._bind(binding, name, tensor) for name, tensor in inputs.items()]
        for past, present in self._widths:
            cache = self._caches[past]
            kept.append(self._bind(binding, past, cache))
            self._bind_output(binding, present, cache)
        self._bind_output(binding, self._manifest["outputs"][0]["name"], logits)
        self._session.run_with_iobinding(binding)
        del kept
        return logits[:, 0].float()

    def _bind(self, binding: Any, name: str, tensor: Tensor) -> Tensor:
        """Binds the tensor's memory; the caller keeps it alive until the run is over."""
        tensor = tensor.contiguous()
        binding.bind_input(name, "cpu", 0, _element(tensor.dtype), tuple(tensor.shape), tensor.data_ptr())
        return tensor

    @staticmethod
    def _bind_output(binding: Any, name: str, tensor: Tensor) -> None:
        binding.bind_output(name, "cpu", 0, _element(tensor.dtype), tuple(tensor.shape), tensor.data_ptr())

    def _grow(self, length: int) -> None:
        self._length = length
        for (past, _), width in self._widths.items():
            grown = torch.zeros(self.batch, length, width, dtype=self._dtype)
            old = self._caches.get(past)
            if old is not None:
                grown[:, : old.shape[1]] = old
            self._caches[past] = grown


def _check_weight_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Weights lie in the checkpoint's own files: the graph is worthless over any others."""
    for name in manifest["weights"]["linked_files"]:
        file, known = folder / name, manifest["source"]["files"].get(name)
        if not file.is_file():
            raise UserError(f"{file}: missing, and the model's weights are in it; export again, or put the file back")
        if known is not None and file_digest(file) != known:
            raise UserError(f"{file}: not the file this model was exported from (its digest differs); export again")


def _element(dtype: torch.dtype) -> Any:
    import numpy as np

    return {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}[dtype]


def _open(file: Path, threads: int | None) -> tuple[Any, str]:
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    # onnxruntime-gpu lists CUDA wherever it is installed, and complains on stderr where there is no device.
    usable = (
        ("CUDAExecutionProvider", "CPUExecutionProvider") if torch.cuda.is_available() else ("CPUExecutionProvider",)
    )
    wanted = [name for name in usable if name in ort.get_available_providers()]
    try:
        session = ort.InferenceSession(str(file), options, providers=wanted)
    except Exception as error:  # onnxruntime raises its own, unrelated kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
        raise UserError(
            f"{file}: onnxruntime cannot load it ({reason}); are all files of the export beside it?"
        ) from error
    return session, session.get_providers()[0]
