"""The one place where files are opened for writing, and where links are made.

Always as new files: what has the name already (a file, a hard link into somebody's checkpoint, a symbolic link) is never
written to. `tests/files/test_who_writes.py` lets nothing else in the package open a file for writing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FICLONE = 0x40049409  # linux/fs.h: share the data blocks of another file (btrfs, xfs)
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP}
_CHUNK = 2**20  # bytes: stays in the cache; 16 MiB took up to twice the time (benchmarks/copying.py)
# What may be one with the source's file by a hard link: too large to have twice, and nobody edits it in place.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".data", ".onnx_data", ".engine"}


def create(file: Path) -> BinaryIO:
    """A new file, open for writing. Raises FileExistsError when there is anything of that name, even a link to nowhere."""
    return os.fdopen(os.open(file, _NEW, 0o666), "wb")


def write_new(file: Path, content: bytes | memoryview | str) -> None:
    """A new file with this content (text as UTF-8). Raises as `create` does."""
    with create(file) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def write_json(file: Path, value: Mapping[str, Any], indent: int = 2) -> None:
    """A new file with one JSON object. Raises as `create` does."""
    # backslashreplace: what is left of a path that is no text, \udcff, is how JSON spells it
    write_new(file, json.dumps(value, indent=indent, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def place_file(source: Path, target: Path, *, link: bool) -> str:
    """Put the contents of `source` at `target`, a new file; returns how: "hardlink", "reflink" or "copy".

    Links in `source` (as in the hub cache) are followed: `target` is a regular file. `link` asks for no second copy on
    disk, and is heard for weights alone: whoever edits a config or a tokenizer edits one folder's. Where the file system
    has neither hard links nor reflinks, or lies on another disk, it is copied all the same.
    """
    real = source.resolve(strict=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if link and source.suffix in _WEIGHTS:
        try:
            os.link(real, target)
            return "hardlink"
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
    with real.open("rb") as reader, create(target) as writer:
        if _reflink(reader.fileno(), writer.fileno()):
            return "reflink"
        shutil.copyfileobj(reader, writer, _CHUNK)
    return "copy"


def can_link(source: Path, target: Path) -> bool:
    """Whether `place_file` takes no room for `source` at `target`, a new file: tried, since mounts, owners and file systems all
    have a say."""
    real = source.resolve(strict=True)
    if source.suffix in _WEIGHTS:
        try:
            os.link(real, target)
            return True
        except OSError:
            pass
    with real.open("rb") as reader, create(target) as writer:
        return _reflink(reader.fileno(), writer.fileno())


def link_to(existing: Path, name: Path) -> None:
    """A symbolic link called `name`, where nothing may be."""
    os.symlink(existing, name)


def _reflink(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True
