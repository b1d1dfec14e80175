"""Shards of a DSA checkpoint that are not the source's own files, and back.

    the source's shard                     the DSA checkpoint
      a  b  c  d             ->             a     c            the same name, without what is made anew or dropped
                                            b'                 DERIVED_SHARD, from b by a family's rule
                                            [header] d         ORIGINALS: what `strip` cannot compute again

Only shards that hold such tensors are written; all others are hard links. ORIGINALS is in the safetensors format under a name that
no runtime looks for: the headers of the shards that were written, and tensors that were scaled or dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...errors import UserError
from ...files.digests import file_sha256
from ...files.dtypes import BY_SAFETENSORS, torch_dtype
from ...files.json_files import parse_object
from ...files.regular import open_regular
from ...files.safetensors_index import TensorLocation, head_length, header_bytes, read_header
from ...files.writing import create
from .folding import derive, undo
from .folds import Folding
from .names import DERIVED_SHARD, ORIGINALS
from .steps import Derived

_HEADER = "header/"  # of a shard, in ORIGINALS
_CHUNK = 2**20  # bytes: stays in the cache; 16 MiB took up to twice the time (benchmarks/copying.py)


def write_shard(source: Path, target: Path, without: set[str]) -> dict[str, Any]:
    """A copy without some tensors; returns {"size", "sha256"} of the whole source. `target` is not written when nothing is left."""
    tensors = _by_offset(read_header(source))
    kept = {name: place for name, place in tensors.items() if name not in without}
    with open_regular(source) as reader:
        if kept:
            with create(target) as writer:
                layout = {name: (place.dtype, place.shape) for name, place in kept.items()}
                writer.write(header_bytes(layout, {"format": "pt"}))
                for place in kept.values():
                    _copy(reader, writer, place)
        reader.seek(0)
        digest = hashlib.file_digest(reader, "sha256").hexdigest()
    return {"size": source.stat().st_size, "sha256": digest}


def write_derived(folder: Path, folding: Folding) -> dict[str, int]:
    """DERIVED_SHARD, one tensor in memory at a time; returns bytes per tensor name."""
    if not folding.derived:
        return {}
    made = list(folding.derived.values())
    with create(folder / DERIVED_SHARD) as stream:
        stream.write(header_bytes({it.name: (it.dtype, it.shape) for it in made}, {"format": "pt"}))
        for it in made:
            tensor = derive(it, read_tensor(folding.tensors[it.source]))
            if tuple(tensor.shape) != it.shape:
                raise UserError(f"{it.name}: {list(tensor.shape)} after its fold, expected {list(it.shape)}")
            _check_finite(it, tensor)
            stream.write(_bytes(tensor))
    return {name: place.nbytes for name, place in read_header(folder / DERIVED_SHARD).items()}


def write_originals(folder: Path, shards: Iterable[Path], folding: Folding, aside: Collection[str]) -> None:
    """ORIGINALS: the headers of `shards`, and every tensor that cannot be computed from the DSA checkpoint. aside: names of files
    that are there as a whole."""
    headers = {f"{_HEADER}{shard.name}": shard for shard in shards}
    lost = {name: folding.tensors[name] for name in sorted(folding.lost)}
    lost = {name: place for name, place in lost.items() if place.file.name not in aside}
    layout: dict[str, tuple[str, tuple[int, ...]]]
    layout = {name: ("U8", (head_length(shard),)) for name, shard in headers.items()}
    layout |= {name: (place.dtype, place.shape) for name, place in lost.items()}
    with create(folder / ORIGINALS) as writer:
        writer.write(header_bytes(layout, {"format": "pt"}))
        for shard in headers.values():
            with open_regular(shard) as reader:
                writer.write(reader.read(head_length(shard)))
        for place in lost.values():
            with open_regular(place.file) as reader:
                _copy(reader, writer, place)


def restore_shard(dsa: Path, left: Path, target: Path, derived: Mapping[str, Derived], sha256: str) -> None:
    """The source's shard again, under its old name. left: what is of it in `dsa`, if anything is; derived: what was made of its
    tensors and can be taken back, by their names. Raises UserError when the result is not what was converted."""
    originals = read_header(dsa / ORIGINALS)
    header = _read_bytes(originals, f"{_HEADER}{target.name}", dsa)
    here = {**originals, **(read_header(left) if left.exists() else {})}
    made = read_header(dsa / DERIVED_SHARD) if derived else {}
    with create(target) as writer:
        writer.write(header)
        for name in _names_in(header):
            if name in here:
                with open_regular(here[name].file) as reader:
                    _copy(reader, writer, here[name])
            elif name in derived and derived[name].name in made:
                writer.write(_bytes(_undone(derived[name], made)))
            else:
                raise UserError(f"{dsa}: nothing to restore {name} of {target.name} from; fetch the folder again")
    if file_sha256(target) != sha256:
        raise UserError(
            f"{left}: {target.name} cannot be restored bit for bit, since files of {dsa} were changed since the conversion; "
            "put the original files back"
        )


def _undone(made: Derived, stored: Mapping[str, TensorLocation]) -> Tensor:
    try:
        return undo(made, read_tensor(stored[made.name]))
    except ValueError as error:
        raise UserError(f"{stored[made.name].file}: {made.name}: {error}; fetch the folder again") from None


def _read_bytes(tensors: Mapping[str, TensorLocation], name: str, dsa: Path) -> bytes:
    if name not in tensors:
        raise UserError(f"{dsa / ORIGINALS}: no {name} in it; fetch the file again")
    return bytes(_bytes(read_tensor(tensors[name])))


def _names_in(header: bytes) -> list[str]:
    """Tensors of a shard in the order of their bytes."""
    entries = parse_object(header[8:], ORIGINALS)
    entries.pop("__metadata__", None)
    return sorted(entries, key=lambda name: entries[name]["data_offsets"])


def read_tensor(place: TensorLocation) -> Tensor:
    """As it is stored."""
    with open_regular(place.file) as reader:
        reader.seek(place.offset)
        data = bytearray(reader.read(place.nbytes))
    dtype = torch_dtype(BY_SAFETENSORS[place.dtype].name)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(place.shape)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _by_offset(tensors: Mapping[str, TensorLocation]) -> dict[str, TensorLocation]:
    return dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))


def _copy(reader: BinaryIO, writer: BinaryIO, place: TensorLocation) -> None:
    reader.seek(place.offset)
    left = place.nbytes
    while left:
        chunk = reader.read(min(left, _CHUNK))
        if not chunk:
            raise UserError(f"{place.file}: truncated while it was read; fetch the file again")
        writer.write(chunk)
        left -= len(chunk)


def _check_finite(made: Derived, tensor: Tensor) -> None:
    if tensor.dtype.itemsize > 1 and not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{made.name}: not finite after its fold of {made.source}; fetch the file again")
