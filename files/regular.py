"""Files from anywhere, opened only if they are regular ones: a FIFO or a device would hang a run or never end."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from ..errors import UserError

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_regular(file: Path) -> io.BufferedReader:
    """For reading; links are followed. Raises UserError for what is no regular file, OSError as `open` does."""
    return open(file, "rb", opener=_descriptor)


def _descriptor(file: str, _: int) -> int:
    """The stream that `open` makes of it is the only one to close it: had we to do so as well, a signal between the two would
    close it twice, and the second time fails, or hits a file that another thread has opened since."""
    descriptor = os.open(file, _FLAGS)  # O_NONBLOCK: opening a FIFO would wait for a writer
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return descriptor
    os.close(descriptor)
    raise UserError(f"{file}: {_KINDS.get(kind, 'no regular file')}, expected a regular file")


def read_within(file: Path, most: int) -> bytes:
    """All of a regular file of at most `most` bytes. Raises UserError for another one, OSError as `open` does."""
    with open_regular(file) as stream:
        data = stream.read(most + 1) or b""  # None where the file is one of /proc that has nothing to say yet
    if len(data) > most:
        raise UserError(f"{file}: longer than {most} bytes, which is the most that is read of such a file")
    return data


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file's name and nothing else: no folder, no way out of one, nothing a terminal would act on."""
    return name not in ("", ".", "..") and len(name) < 256 and name.isprintable() and not set(name) & {"/", "\\"}


def is_inside(name: str) -> bool:
    """Whether `name` is a relative posix path that stays inside of its folder, written in the one usual way."""
    return len(name) < 4096 and all(map(is_plain_name, name.split("/")))
