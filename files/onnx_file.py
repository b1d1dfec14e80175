"""ONNX files from anywhere: read whole, once, and their external data only from regular files in the same folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import UserError, short
from .regular import is_plain_name, open_regular, read_within

_MOST_BYTES = 2**31 - 1  # protobuf's own limit


def read_onnx(file: Path) -> bytes:
    """Raises UserError."""
    try:
        return read_within(file, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def parse_onnx(file: Path, data: bytes) -> Any:
    """The ModelProto that `data`, read from `file`, is; no external data is read. Raises UserError."""
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own error types
        raise UserError(f"{file}: not an ONNX model ({short(str(error)) or 'unreadable'})") from error
    if not model.graph.node:
        raise UserError(f"{file}: not an ONNX model (its graph has no nodes)")
    return model


def external_bytes(file: Path, model: Any) -> dict[str, int]:
    """Bytes that initialisers take in other files, by file name. Raises UserError where a name leads out of the folder."""
    found: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        if tensor.external_data:
            places = {entry.key: entry.value for entry in tensor.external_data}
            name, length = places.get("location", ""), places.get("length", "0")
            if not is_plain_name(name) or not length.isascii() or not length.isdigit() or len(length) > 18:
                raise UserError(
                    f"{file}: {short(tensor.name)} lies in {short(name)} ({short(length)} bytes), expected the name of a "
                    "file beside the model and a number; export again"
                )
            found[name] += int(length)
    return dict(found)


def check_external_files(file: Path, model: Any) -> None:
    """Raises UserError where a file that initialisers lie in is absent, or no regular file."""
    for name in external_bytes(file, model):
        try:
            open_regular(file.parent / name).close()
        except OSError as error:
            raise UserError(
                f"{file.parent / name}: cannot be read ({error.strerror}), and the model's weights are in it; export again"
            ) from error
