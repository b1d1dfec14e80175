"""Folders that appear whole or not at all: made in a hidden sibling, renamed into place at the end.

A killed run leaves at most `.<name>.partial-<pid>`; the next run for the same folder removes it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError, UserError

_FICLONE = 0x40049409  # linux/fs.h: share the data blocks of another file (btrfs, xfs)
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def staged_folder(source: Path, out: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `out`, which becomes `out` when the block ends well and is removed when it does not.

    Raises UsageError when `out` may not be written (see `check_target`), UserError when the disk refuses.
    """
    source, out = source.resolve(), out.resolve()
    check_target(source, out, overwrite=overwrite)
    folder = _sibling(out, "partial", os.getpid())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _recover(out)
        folder.mkdir()
        yield folder
        _sync_tree(folder)
        _publish(folder, out)
    except BaseException as error:  # Ctrl-C too: nothing half-done stays
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(_explain(error, out)) from error
        raise


def check_target(source: Path, out: Path, *, overwrite: bool) -> None:
    """Raises UsageError when `out` overlaps `source`, is no folder, or is in use and not to be overwritten."""
    source, out = source.resolve(), out.resolve()
    if out == source:
        raise UsageError(f"{out}: output and source are the same folder; choose another output folder")
    if source in out.parents or out in source.parents:
        raise UsageError(f"{out}: output and source ({source}) lie inside one another; choose a folder outside")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: is a file; choose another output folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out}: not empty; choose another output folder, or pass --overwrite to replace it")
    if not (out / "config.json").is_file():
        raise UsageError(f"{out}: holds no config.json, so it is no checkpoint to overwrite; remove it yourself")


def place_file(source: Path, target: Path, *, link: bool) -> str:
    """Put the contents of `source` at `target`; returns how: "hardlink", "reflink" or "copy".

    Links in `source` (as in the hub cache) are followed: `target` is a regular file. `link` asks for no second copy on
    disk; where the file system has neither hard links nor reflinks, or lies on another disk, it is copied all the same.
    """
    real = source.resolve(strict=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(real, target)
            return "hardlink"
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        if _reflink(real, target):
            return "reflink"
    shutil.copyfile(real, target)
    return "copy"


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return False
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
            return True
        except OSError:
            pass
    target.unlink()
    return False


def _sibling(out: Path, role: str, pid: int) -> Path:
    return out.parent / f".{out.name}.{role}-{pid}"


def _recover(out: Path) -> None:
    """Clear what runs killed earlier have left: partial folders, and the old folder of an interrupted replacement."""
    for role in ("old", "partial"):
        prefix = f".{out.name}.{role}-"
        for path in out.parent.iterdir():
            pid = path.name.removeprefix(prefix)
            if not path.name.startswith(prefix) or not pid.isdigit() or _alive(int(pid)):
                continue
            if role == "old" and not out.exists():
                os.rename(path, out)  # killed between the two renames of `_publish`
            else:
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():  # left by an earlier process of the same number
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _publish(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`. A full `out` is moved aside first and removed last, so one of both always exists."""
    old = _sibling(out, "old", os.getpid())
    try:
        if out.exists() and any(out.iterdir()):
            os.rename(out, old)
        os.rename(folder, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)  # the new folder is in place; a leftover is cleared by the next run


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            if os.stat(Path(parent, name)).st_nlink == 1:  # a hard link has nothing of ours to write back
                _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, out: Path) -> str:
    if error.errno in _DISK_FULL:
        return f"{out}: not written, no space left on the disk (nothing stays behind); free some or use another disk"
    where = f" ({error.filename})" if error.filename else ""
    return f"{out}: not written, {error.strerror or error}{where}"
