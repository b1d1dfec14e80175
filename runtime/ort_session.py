"""Run an exported ONNX folder in onnxruntime, with caches bound in place: what `generate --runtime onnxruntime` uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, short
from ..files.dtypes import torch_dtype
from ..files.manifests.export_manifest import (
    EXPORT_MANIFEST,
    check_limits,
    check_weight_files,
    read_export,
    read_onnx_export,
)
from ..files.onnx_file import check_external_files, parse_onnx
from .caches import Caches, outputs_of, widths_of

_ORT_TYPES = {"tensor(int64)": "int64", "tensor(float)": "float32", "tensor(float16)": "float16"}
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # of a model that comes as bytes
_DTYPES = ("float32", "float16")  # of which onnxruntime has kernels on a CPU


class OrtSession:
    """A session on an exported folder. The CUDA provider is used where onnxruntime has it, the CPU's otherwise.

    Input and output of a cache are the same memory: a step writes its rows and copies nothing.
    """

    def __init__(self, folder: Path, batch: int, capacity: int | None = None, threads: int | None = None) -> None:
        self._manifest = read_export(folder, "onnx")
        self.batch, self.capacity = batch, check_limits(folder, self._manifest, batch, capacity)
        self._dtype = self._supported_dtype(folder)
        check_weight_files(folder, self._manifest)
        file = folder / self._manifest["file"]
        self._session, self._device = _open(file, read_onnx_export(folder, self._manifest), threads)
        _check_interface(file, self._session, self._manifest)
        self._present = outputs_of(self._manifest)
        self._caches = Caches(widths_of(self._manifest), batch, self.capacity, self._dtype, self._device)

    def _supported_dtype(self, folder: Path) -> torch.dtype:
        name = self._manifest["dtype"]
        if name not in _DTYPES:
            raise UserError(
                f"{folder}: exported as {name}, which onnxruntime cannot run; export with --dtype float32 or float16"
            )
        return torch_dtype(name)

    def step(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor, last: Tensor) -> Tensor:
        """See `generation.Session`."""
        self._caches.reserve(int(slots.max()) + 1)
        inputs = {"input_ids": ids, "position_ids": positions, "slots": slots, "key_begin": key_begin, "last": last}
        shape = (self.batch, 1, int(self._manifest["model"]["vocab_size"]))
        logits = torch.empty(shape, dtype=self._dtype, device=self._device)
        binding = self._session.io_binding()
        kept = [self._bind_input(binding, name, tensor) for name, tensor in (inputs | self._caches.tensors).items()]
        for past, cache in self._caches.tensors.items():
            self._bind_output(binding, self._present[past], cache)
        self._bind_output(binding, self._manifest["outputs"][0]["name"], logits)
        if self._device == "cuda":
            torch.cuda.current_stream().synchronize()  # onnxruntime reads on a stream of its own
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        del kept
        return logits[:, 0].float().cpu()

    def _bind_input(self, binding: Any, name: str, tensor: Tensor) -> Tensor:
        """Binds the tensor's memory; the caller keeps it alive until the run is over."""
        tensor = tensor.to(self._device).contiguous()
        place = (self._device, 0, _element(tensor.dtype), tuple(tensor.shape), tensor.data_ptr())
        binding.bind_input(name, *place)
        return tensor

    def _bind_output(self, binding: Any, name: str, tensor: Tensor) -> None:
        place = (self._device, 0, _element(tensor.dtype), tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output(name, *place)


def _element(dtype: torch.dtype) -> Any:
    import numpy as np

    return {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}[dtype]


def _open(file: Path, data: bytes, threads: int | None) -> tuple[Any, str]:
    """The session on the model `data`, read from `file`, and where its tensors live: "cuda" or "cpu"."""
    import onnxruntime as ort

    check_external_files(file, parse_onnx(file, data))

    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(file.parent))
    if threads is not None:
        options.intra_op_num_threads = threads
    # onnxruntime-gpu lists CUDA wherever it is installed, and complains on stderr where there is no device.
    usable = (
        ("CUDAExecutionProvider", "CPUExecutionProvider") if torch.cuda.is_available() else ("CPUExecutionProvider",)
    )
    wanted = [name for name in usable if name in ort.get_available_providers()]
    try:
        session = ort.InferenceSession(data, options, providers=wanted)
    except Exception as error:  # onnxruntime raises its own, unrelated kinds
        reason = short((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
        raise UserError(
            f"{file}: onnxruntime cannot load it ({reason}); are all files of the export beside it?"
        ) from error
    return session, "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"


def _check_interface(file: Path, session: Any, manifest: dict[str, Any]) -> None:
    """The manifest has to be of this very model: buffers are made as it says. Raises UserError."""
    for field, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        found = [(value.name, _ORT_TYPES.get(value.type), list(map(_dim, value.shape))) for value in values]
        told = [(value["name"], value["dtype"], list(map(_dim, value["shape"]))) for value in manifest[field]]
        if found != told:
            raise UserError(f"{file}: its {field} are not those that {EXPORT_MANIFEST} lists; export again")


def _dim(size: int | str) -> int | None:
    """A number; None for an open dim, which has no one name."""
    return size if isinstance(size, int) else None
