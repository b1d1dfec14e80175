"""A `.pt2` file, which `torch.export.load` would run if it asked for it: opened once, looked at whole, then made a program.

    model/models/model.json                               the graph: `pt2_graph` looks at it
    model/data/weights/model_weights_config.json          name -> record, dtype, sizes, strides
    model/data/weights/weight_0 ...                       raw bytes
    model/data/constants/...                              the same, tensor_0 ...
    model/data/sample_inputs/model.pt                     empty in our exports: a pickle otherwise

torch 2.11 to 2.13 write this. Nothing is unpickled, whatever the archive says, and no entry is read that is not listed above.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..compat.torch_private import saved_element_type, saved_program
from ..errors import UserError, short
from ..files.json_files import MOST_BYTES, parse_object
from ..files.manifests.export_manifest import check_model_file
from ..files.regular import open_regular
from ..kernels import ops  # noqa: F401  registers what a graph names
from .pt2_graph import checked_graph

_GRAPH, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_TENSORS = {"weights": "weight", "constants": "tensor"}
_ENTRY = re.compile(
    r"models/model\.json|data/(weights/(weight_\d{1,9}|model_weights_config\.json)"
    r"|constants/(tensor_\d{1,9}|model_constants_config\.json)|sample_inputs/model\.pt)"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
_FIXED = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}
_MOST_ENTRIES = 1_000_000
_CHUNK = 2**24
_ENCRYPTED = 1
_SCHEMA_MAJOR = 8  # of descriptions of programs: torch 2.11 to 2.13


def load_pt2(file: Path, manifest: Mapping[str, Any]) -> ExportedProgram:
    """The program with its weights and constants, on the CPU; manifest: of the export. Raises UserError for anything but an
    export of mla2dsa, and that one."""
    try:
        with open_regular(file) as stream, _opened(file, stream, manifest) as archive:
            entries = _entries(file, archive, os.fstat(stream.fileno()).st_size)
            document = _object(file, archive, entries, _GRAPH)
            _check_version(file, document)
            checked_graph(document, str(file))
            weights, constants = (dict(_tensors(file, archive, entries, folder)) for folder in _TENSORS)
        return saved_program(document, weights, constants)
    except UserError:
        raise
    except Exception as error:  # zip, zlib, JSON schema, sympy and torch errors, each of its own kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UserError(
            f"{file}: torch {torch.__version__} cannot load it ({short(reason, 200)}); export again"
        ) from error


def _opened(file: Path, stream: BinaryIO, manifest: Mapping[str, Any]) -> zipfile.ZipFile:
    """The check and all that follows read one opened file: another that is put in its place is not looked at."""
    check_model_file(file, stream, manifest)
    return zipfile.ZipFile(stream)


def _entries(file: Path, archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """What the archive holds, by its name below the one folder that all of it lies in."""
    listed = archive.infolist()
    if not listed or len(listed) > _MOST_ENTRIES:
        _refuse(file, f"an archive of {len(listed)} entries")
    root = listed[0].orig_filename.partition("/")[0]
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in listed:
        name = entry.orig_filename.removeprefix(f"{root}/")
        if entry.orig_filename == name or _ENTRY.fullmatch(name) is None:
            _refuse(file, f"holds {short(entry.orig_filename)}")
        if name in found:
            _refuse(file, f"holds {name} twice")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            _refuse(file, f"{name} is compressed or encrypted")
        found[name] = entry
    if sum(entry.file_size for entry in listed) > size:
        _refuse(file, "its entries overlap")
    for name, content in _FIXED.items():
        if name not in found or archive.read(found[name]) != content:
            _refuse(file, f"{name} is not {content.decode()}")
    if _SAMPLES in found and found[_SAMPLES].file_size:
        _refuse(file, f"{_SAMPLES} is not empty: it is a pickle")
    return found


def _object(file: Path, archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str) -> dict[str, Any]:
    if name not in entries:
        _refuse(file, f"has no {name}")
    if entries[name].file_size > MOST_BYTES:
        _refuse(file, f"{name} is longer than {MOST_BYTES} bytes")
    return parse_object(archive.read(entries[name]), f"{file}: {name}")


def _check_version(file: Path, document: Mapping[str, Any]) -> None:
    match document.get("schema_version"):
        case {"major": int(major)} if major == _SCHEMA_MAJOR:
            return
        case version:
            raise UserError(
                f"{file}: a program of version {short(version)}, this mla2dsa reads {_SCHEMA_MAJOR}; export again"
            )


def _tensors(
    file: Path, archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], folder: str
) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of the weights, or of the constants. Several may share a record."""
    records: dict[str, bytearray] = {}
    listed = _object(file, archive, entries, f"data/{folder}/model_{folder}_config.json").get("config")
    if not isinstance(listed, dict):
        _refuse(file, f"its {folder} have no list")
    for name, entry in listed.items():
        match entry:
            case {
                "path_name": str(record),
                "is_param": bool(is_parameter),
                "use_pickle": False,
                "tensor_meta": {**meta},
            }:
                place = f"data/{folder}/{record}"
            case _:
                _refuse(file, f"{short(name)} is a pickle, or damaged")
        if not record.startswith(f"{_TENSORS[folder]}_") or place not in entries:
            _refuse(file, f"{short(name)} lies in {short(record)}")
        if record not in records:
            records[record] = _bytes(archive, entries[place])
        value = _tensor(file, name, meta, records[record])
        yield name, torch.nn.Parameter(value, requires_grad=False) if is_parameter else value


def _bytes(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    """zipfile compares the checksum when the last byte has been read."""
    data = bytearray(entry.file_size)
    view, at = memoryview(data), 0
    with archive.open(name=entry) as stream:
        while part := stream.read(_CHUNK):
            view[at : at + len(part)] = part
            at += len(part)
    return data


def _tensor(file: Path, name: str, meta: Mapping[Any, Any], data: bytearray) -> Tensor:
    match meta:
        case {
            "dtype": int(number), "sizes": [*sizes], "strides": [*strides], "storage_offset": {"as_int": int(offset)},
            "device": {"type": "cpu"},
        }:  # fmt: skip
            dims = [_number(file, name, size) for size in sizes]
            steps = [_number(file, name, stride) for stride in strides]
        case _:
            _refuse(file, f"{short(name)} has no size, or is not on the CPU")
    dtype = saved_element_type(number)
    if math.prod(dims) * dtype.itemsize > len(data):
        _refuse(file, f"{short(name)} is larger than its bytes")
    if not data:
        return torch.empty(dims, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).as_strided(dims, steps, offset)


def _number(file: Path, name: str, value: Any) -> int:
    match value:
        case {"as_int": int(number)} if 0 <= number < 2**48:
            return number
    return _refuse(file, f"{short(name)} has the size {short(value)}")


def _refuse(file: Path, what: str) -> NoReturn:
    raise UserError(
        f"{file}: {what}, unlike any .pt2 that mla2dsa exports; torch might run what is in it, so it is not loaded: export again"
    )
