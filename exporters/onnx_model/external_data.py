"""Where an ONNX model's weights lie: in the checkpoint's own safetensors files, by offset and length, wherever that works.

    stored plainly (float32, float16, bfloat16)  ->  external data inside the safetensors file, hard-linked beside the model;
                                                      another dtype than the graph's is cast in the graph, not on disk
    everything else (quantised, misaligned)      ->  written once to `model.data`, a tensor at a time

onnxruntime refuses symbolic links, so links are hard (or reflinks, or else copies). onnxruntime and TensorRT read them;
Python's own `onnx.load` and path-based `onnx.checker` refuse files with a second hard link. With `copy_weights` all weights
are written to `model.data` instead and nothing is linked: any tool takes that folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir
import torch
from torch import Tensor

from ...files.dtypes import BY_NAME, MODEL_DTYPES, element_type
from ...files.safetensors_index import TensorLocation
from ...files.writing import create, place_file

DATA_FILE = "model.data"
_PAGE = 4096  # lets a runtime map a large tensor on its own
_ALIGNED = 64
_CHUNK = 2**24
_PLAIN = {BY_NAME[name].safetensors: ir.DataType[BY_NAME[name].onnx] for name in MODEL_DTYPES}


@dataclass(frozen=True)
class Stored:
    """One tensor of the checkpoint. load: its value, in the dtype the graph declares (dequantised if need be)."""

    name: str
    location: TensorLocation
    load: Callable[[], Tensor]

    @property
    def plain(self) -> bool:
        """Usable where it lies: an ordinary float type, aligned to its own size."""
        return self.location.dtype in _PLAIN and self.location.offset % _PLAIN[self.location.dtype].itemsize == 0


@dataclass
class Placement:
    """Puts tensors into `folder` and keeps account of it."""

    folder: Path
    copy_weights: bool = False
    linked: dict[Path, str] = field(default_factory=dict)
    zero_copy_bytes: int = 0
    written: list[dict[str, Any]] = field(default_factory=list)
    _stream: BinaryIO | None = None

    def tensor(self, stored: Stored) -> ir.ExternalTensor:
        """`stored` as external data, in the dtype it has on disk."""
        if stored.plain and not self.copy_weights:
            place = stored.location
            return self.region(stored.name, place.file, place.offset, place.nbytes, place.dtype, place.shape)
        return self.write(stored.name, [stored], stored.location.shape)

    def region(
        self, name: str, file: Path, offset: int, nbytes: int, dtype: str, shape: Sequence[int]
    ) -> ir.ExternalTensor:
        """Bytes of a checkpoint file, in place."""
        if file not in self.linked:
            self.linked[file] = file.name
            place_file(file, self.folder / file.name, link=True)
        self.zero_copy_bytes += nbytes
        return self._external(self.linked[file], name, offset, nbytes, dtype, shape)

    def write(self, name: str, parts: Sequence[Stored], shape: Sequence[int]) -> ir.ExternalTensor:
        """The parts one after the other as one tensor of `shape`; one part in memory at a time, plain ones in chunks."""
        dtypes = {part.location.dtype for part in parts}
        raw = len(dtypes) == 1 and dtypes <= _PLAIN.keys()
        stream = self._open()
        stream.seek(-stream.tell() % (_PAGE if len(parts) > 1 or parts[0].location.nbytes >= _PAGE else _ALIGNED), 1)
        begin = stream.tell()
        dtype = parts[0].location.dtype if raw else ""
        for part in parts:
            if raw:
                for chunk in _chunks(part.location):
                    stream.write(chunk)
                continue
            value = part.load().contiguous()
            dtype = element_type(value.dtype).safetensors
            stream.write(value.view(torch.uint8).flatten().numpy().data)
        nbytes = stream.tell() - begin
        reason = "--copy-weights" if self.copy_weights else _reason(parts)
        self.written.append({"name": name, "bytes": nbytes, "reason": reason})
        return self._external(DATA_FILE, name, begin, nbytes, dtype, shape)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def summary(self) -> dict[str, Any]:
        """The manifest's account of the weights."""
        return {
            "linked_files": sorted(self.linked.values()),
            "zero_copy_bytes": self.zero_copy_bytes,
            "written_bytes": sum(entry["bytes"] for entry in self.written),
            "written": self.written,
        }

    def _open(self) -> BinaryIO:
        if self._stream is None:
            self._stream = create(self.folder / DATA_FILE)
        return self._stream

    def _external(
        self, file: str, name: str, offset: int, nbytes: int, dtype: str, shape: Sequence[int]
    ) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            file, offset, nbytes, _PLAIN[dtype], shape=ir.Shape(shape), name=name, base_dir=self.folder
        )


def _chunks(place: TensorLocation) -> Iterator[bytes]:
    with place.file.open("rb") as source:
        source.seek(place.offset)
        left = place.nbytes
        while left:
            chunk = source.read(min(left, _CHUNK))
            left -= len(chunk)
            yield chunk


def _reason(parts: Sequence[Stored]) -> str:
    odd = sorted({part.location.dtype for part in parts} - _PLAIN.keys())
    if odd:
        return f"stored as {', '.join(odd)}, dequantised"
    if len(parts) > 1:
        return "experts that do not lie side by side in the checkpoint"
    return "not aligned in the checkpoint"
