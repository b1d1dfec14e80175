"""What identifies a file: hashes, of the whole or of its beginning."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import UserError
from .regular import open_regular
from .safetensors_index import head_length

WHOLE_HASH_LIMIT = 64 * 2**20  # files up to 64 MiB are hashed whole, larger ones by their beginning
_OPAQUE_HEAD = 2**20


def file_sha256(file: Path) -> str:
    """Of the whole file, in hexadecimal."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_digest(file: Path) -> dict[str, int | str]:
    """What identifies a file: {"size", "hashed", "sha256"}; the sha256 covers the first `hashed` bytes.

    Files up to 64 MiB are covered whole; of larger ones the safetensors header (names, dtypes, shapes, offsets), or the
    first MiB of any other format: to read hundreds of GB just to recognise a checkpoint would outlast its conversion.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            hashed = size if size <= WHOLE_HASH_LIMIT else _head_length(file)
            return {"size": size, "hashed": hashed, "sha256": hashlib.sha256(stream.read(hashed)).hexdigest()}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _head_length(file: Path) -> int:
    return head_length(file) if file.suffix == ".safetensors" else _OPAQUE_HEAD
