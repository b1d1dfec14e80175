"""System calls that Python has no name for."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # linux/fcntl.h, linux/fs.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NOT_HERE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}  # an old kernel, or a file system that lacks the flag


def move_folder(old: Path, new: Path) -> None:
    """Rename the folder `old` to `new`, where nothing may be. Raises FileExistsError if something is, and changes nothing.

    Where the system has no rename of this kind, an empty folder that comes to `new` at the last moment is replaced; POSIX
    renames a folder onto nothing else.
    """
    if _renameat2(old, new, _NOREPLACE):
        return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    try:
        os.rename(old, new)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from error
        raise


def exchange_folders(one: Path, other: Path) -> bool:
    """Each gets the other's name, at one instant. False, with nothing changed, where the system cannot."""
    return _renameat2(one, other, _EXCHANGE)


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent, of process id `parent`, ends in whatever way (Linux; else nothing)."""
    prctl = getattr(_libc(), "prctl", None)
    if prctl is None:
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    """False where the system lacks it. Raises OSError as rename does."""
    call = getattr(_libc(), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(old), None, str(new))


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
