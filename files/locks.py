"""One run at a time: a lock file that the system itself frees when its holder ends, in whatever way.

A lock file is always a new one: what a killed run has left is removed under its lock, never written to. Removing it is safe
since whoever gets the lock looks whether the name still is the file that he locked.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_THERE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_TRIES = 100  # each means that another run came or went at that very moment
_MARK = "mla2dsa-lock"
_MOST = 4096  # bytes read of a lock file


class Held(Exception):
    """Somebody else has the lock. holder: what its file says."""

    def __init__(self, holder: dict[str, Any]) -> None:
        super().__init__()
        self.holder = holder

    def __str__(self) -> str:
        if not self.holder:
            return "another mla2dsa"
        return "{command} (process {pid} on {host}, since {since})".format(**self.holder)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock file `file`, whose folder exists. Raises Held at once if somebody has it, OSError if it cannot be made,
    UserError if a file of another kind has its name."""
    descriptor = _acquire(file)
    try:
        yield
    finally:
        if _is_called(descriptor, file):
            os.unlink(file)
        os.close(descriptor)


def abandoned(file: Path) -> bool:
    """Whether the lock file is there and nobody holds it."""
    try:
        descriptor = os.open(file, _THERE)
    except OSError:
        return False
    try:
        return _flock(descriptor) and _is_called(descriptor, file)
    finally:
        os.close(descriptor)


def _acquire(file: Path) -> int:
    for _ in range(_TRIES):
        try:
            descriptor = os.open(file, _NEW, 0o644)
        except FileExistsError:
            _clear(file)
            continue
        if _flock(descriptor) and _is_called(descriptor, file):
            os.write(descriptor, json.dumps(_ourselves()).encode())
            return descriptor
        os.close(descriptor)
    raise Held({})


def _clear(file: Path) -> None:
    """Remove the lock file of a run that ended without doing so. Raises Held when it has not ended."""
    try:
        descriptor = os.open(file, _THERE)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{file}: a link in the place of a lock file; remove it") from error
        raise
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        content = os.read(descriptor, _MOST) if regular else b""
        if not regular or (content and _MARK.encode() not in content):
            raise UserError(f"{file}: not a lock file of mla2dsa, but in the place of one; move it away")
        if not _flock(descriptor):
            raise Held(_holder(content))
        if _is_called(descriptor, file):
            os.unlink(file)
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool:
    """Raises OSError where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_called(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False


def _ourselves() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0] or "python").name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"kind": _MARK, "pid": os.getpid(), "host": socket.gethostname(), "command": command[:200], "since": since}


def _holder(content: bytes) -> dict[str, Any]:
    """Empty while it is being written."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    fields = ("pid", "host", "command", "since")
    return {name: found[name] for name in fields} if isinstance(found, dict) and set(fields) <= found.keys() else {}
