"""Where every tensor of a checkpoint lies: safetensors headers and the shard index, read without torch.

A safetensors file is an 8-byte little-endian header length, a JSON header, then the data. Everything here reads headers
only, so a 700 GB checkpoint is indexed in about a second.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..errors import UserError, short
from .dtypes import BY_SAFETENSORS
from .json_files import FETCH_AGAIN, parse_object, read_json
from .regular import is_plain_name, open_regular

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library
_MOST_DIMS = 64  # torch's own limit
_MOST_KEPT = 1024  # headers: DeepSeek-V3 has 163
_COARSEST_CLOCK = 2 * 10**9  # nanoseconds: FAT's clock, the coarsest of file systems

DTYPE_BITS = {name: kind.bits for name, kind in BY_SAFETENSORS.items()}


class TensorLocation(NamedTuple):
    """One tensor on disk: `nbytes` bytes at `offset` from the start of `file`, row-major, little-endian.

    dtype is the safetensors spelling ("BF16", "F32", "F8_E4M3"...). A tuple, since a large model has a hundred thousand of them and a
    frozen dataclass is slower to make.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


_State: TypeAlias = tuple[int, ...]
_Tensors: TypeAlias = dict[str, TensorLocation]
# By file or folder: the state, before it was read, of every file that the tensors come from.
_READ: dict[Path, tuple[dict[Path, _State], _Tensors]] = {}


def read_index(folder: Path) -> dict[str, TensorLocation]:
    """Every tensor of the checkpoint in `folder`, by name.

    `model.safetensors` wins over the index when both exist, as in transformers (`_get_resolved_checkpoint_files`).
    Raises UserError on any disagreement between folder, index and shards: one line with file, tensor and remedy.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if _exists(folder / SINGLE_FILE):
        return read_header(folder / SINGLE_FILE)
    if _exists(folder / INDEX_FILE):
        if (known := _known(folder)) is not None:
            return known
        return _read_shards(folder)
    raise UserError(_without_safetensors(folder))


def read_header(file: Path) -> dict[str, TensorLocation]:
    """The tensors of one safetensors file. Raises UserError when it is absent, truncated or corrupt.

    A command looks at a checkpoint before it imports torch and opens it afterwards: a file that nothing has happened to since
    is parsed once.
    """
    if (known := _known(file)) is not None:
        return known
    state = _state(file)
    tensors = _read_header(file)
    _keep(file, {file: state}, tensors)
    return tensors


def _known(place: Path) -> _Tensors | None:
    """What was read at `place`, if nothing has happened since to any of the files that it came from."""
    if (known := _READ.get(place)) is None or any(_state(file) != state for file, state in known[0].items()):
        return None
    return dict(known[1])


def _keep(place: Path, states: Mapping[Path, _State | None], tensors: _Tensors) -> None:
    """states: of the files, as they were before they were read."""
    known = {file: state for file, state in states.items() if state is not None}
    if len(known) < len(states):
        return
    if len(_READ) >= _MOST_KEPT:
        _READ.clear()
    _READ[place] = (known, dict(tensors))


def _state(file: Path) -> _State | None:
    """What changes when the file does; None where it would not, because the file is as new as the clock of its disk is coarse."""
    try:
        found = file.stat()
    except OSError:
        return None
    if abs(time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns)) < _COARSEST_CLOCK:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_header(file: Path) -> dict[str, TensorLocation]:
    length, entries = _parse_header(file)
    entries.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _location(file, name, entry, start) for name, entry in entries.items()}
    _check_layout(file, tensors, start)
    return tensors


def head_length(file: Path) -> int:
    """Bytes of a safetensors file before its first tensor."""
    return 8 + _parse_header(file)[0]


def header_bytes(layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file whose data are the tensors of `layout` (dtype, shape), in that order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + _nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start aligned, as the library writes it
    return len(text).to_bytes(8, "little") + text


def _exists(file: Path) -> bool:
    return file.exists() or file.is_symlink()  # a dangling link is an error to report, not an absent file


def _without_safetensors(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return f"{folder}: has {some(shards)} but neither {SINGLE_FILE} nor {INDEX_FILE}; fetch the index file"
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        return (
            f"{folder}: no safetensors, only {some(pickles)}; load it with transformers and save it again "
            "(`save_pretrained` writes safetensors)"
        )
    return f"{folder}: no safetensors file found; expected {SINGLE_FILE} or {INDEX_FILE}"


def some(names: Sequence[str], limit: int = 1) -> str:
    """The first names and how many more there are, so that an error stays one line."""
    rest = len(names) - limit
    return ", ".join(map(short, names[:limit])) + (f" and {rest} more" if rest > 0 else "")


def _read_shards(folder: Path) -> dict[str, TensorLocation]:
    index = folder / INDEX_FILE
    states = {index: _state(index)}
    weight_map = _weight_map(index)
    shards: dict[str, _Tensors] = {}
    for name, shard in weight_map.items():
        if shard not in shards:
            states[folder / shard] = _state(folder / shard)
            if not (folder / shard).exists():
                raise UserError(
                    f"{folder / shard}: no such file, but {index} says it holds {short(name)}; fetch the shard"
                )
            shards[shard] = read_header(folder / shard)
    _compare(folder, weight_map, shards)
    tensors = {name: shards[shard][name] for name, shard in weight_map.items()}
    _keep(folder, states, tensors)
    return tensors


def _compare(folder: Path, weight_map: dict[str, str], shards: Mapping[str, Mapping[str, TensorLocation]]) -> None:
    """Index and shards have to tell the same story: runtimes load whole shards, whatever the index says."""
    index = folder / INDEX_FILE
    if missing := [name for name, shard in weight_map.items() if name not in shards[shard]]:
        file = folder / weight_map[missing[0]]
        raise UserError(f"{file}: lacks {some(missing)}, which {index} says it holds; fetch shard and index again")
    for shard, tensors in shards.items():
        if twice := [name for name in tensors if weight_map.get(name, shard) != shard]:
            other = folder / weight_map[twice[0]]
            raise UserError(f"{folder / shard}: holds {some(twice)} again (first in {other}); remove one of them")
        if unlisted := [name for name in tensors if name not in weight_map]:
            raise UserError(f"{folder / shard}: holds {some(unlisted)}, absent from {index}; fetch the index again")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map (tensor name to file name); {FETCH_AGAIN}")
    fine: set[str] = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and (shard in fine or is_plain_name(shard)):
            fine.add(shard)
        else:
            raise UserError(
                f"{index}: weight_map puts {short(name)} into {short(shard)}; expected a file name in the same folder"
            )
    return weight_map


def _parse_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Length of the JSON header in bytes, and the header. Raises UserError."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            if start == b"version ":
                raise UserError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull`")
            length = int.from_bytes(start, "little")
            if size < 8 or (size < 8 + length <= 8 + _HEADER_LIMIT):
                raise UserError(f"{file}: truncated ({size} bytes, the header ends at {8 + length}); {FETCH_AGAIN}")
            if length > _HEADER_LIMIT:
                raise UserError(f"{file}: not a safetensors file (claims a header of {length} bytes); {FETCH_AGAIN}")
            text = stream.read(length)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file, or a link to nowhere; {FETCH_AGAIN}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return length, parse_object(text, f"{file}: corrupt header")


def _location(file: Path, name: str, entry: Any, start: int) -> TensorLocation:
    if not (_is_entry(entry) and _is_text(name)):
        raise UserError(f"{file}: corrupt header entry of {short(name)}: {short(entry)}; {FETCH_AGAIN}")
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise UserError(f"{file}: {short(name)} has dtype {short(dtype)}; known are {', '.join(DTYPE_BITS)}")
    if end - begin != _nbytes(dtype, shape):
        raise UserError(
            f"{file}: {short(name)} takes {short(end - begin)} bytes, but {dtype} {short(list(shape))} needs "
            f"{short(_nbytes(dtype, shape))}; {FETCH_AGAIN}"
        )
    return TensorLocation(file, dtype, shape, start + begin, end - begin)


def _is_entry(entry: Any) -> bool:
    """Plain comparisons, since a large model has a hundred thousand entries, and a `match` statement takes longer."""
    if type(entry) is not dict:
        return False
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (type(dtype) is str and type(shape) is list and type(offsets) is list):
        return False
    if len(shape) > _MOST_DIMS or len(offsets) != 2:
        return False
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**63:
            return False
    begin, end = offsets
    return type(begin) is int and type(end) is int and 0 <= begin <= end


def _is_text(name: str) -> bool:
    """JSON may spell half of a surrogate pair, which no other reader of the file takes."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_layout(file: Path, tensors: Mapping[str, TensorLocation], start: int) -> None:
    """Tensors have to fill the file without gaps or overlaps (the format's own rule), up to its last byte."""
    end = start
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if place.offset != end:
            fault = "overlaps the tensor before it" if place.offset < end else "leaves a gap before it"
            raise UserError(f"{file}: corrupt header, {short(name)} at byte {place.offset} {fault}; {FETCH_AGAIN}")
        end += place.nbytes
    size = file.stat().st_size
    if size < end:
        cut = next(name for name, place in tensors.items() if place.offset + place.nbytes > size)
        raise UserError(f"{file}: truncated ({size} of {end} bytes, {short(cut)} is cut off); {FETCH_AGAIN}")
    if size > end:
        raise UserError(f"{file}: {size - end} bytes follow the last tensor; {FETCH_AGAIN}")


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
