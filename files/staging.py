"""Folders that appear whole or not at all, made by one run at a time, and never in the place of anybody else's.

OUT                              what is being made; nobody sees it before it is whole
.OUT.mla2dsa-lock                held while a run works on OUT; says who does
.OUT.mla2dsa-work-RANDOM/        where it is made; cleared by the next run on OUT when its run was killed
OUT.mla2dsa-finished-RANDOM      the result, when something else came to OUT meanwhile
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, UserError
from .locks import Held, locked
from .ownership import remove_ours, why_not_ours
from .system_calls import exchange_folders, move_folder
from .temporary import clear_abandoned, private_folder, remove_tree, sync_path
from .writing import write_new

_OLD, _NOTE = "old", "number"  # beside a work folder: what was at OUT before, and which folder is the work folder
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class InTheWay(UserError):
    """Something came to OUT during the run; the result is whole, and kept under another name."""


@dataclass(frozen=True)
class Claim:
    """out: resolved. before: device and number of the folder that was there when the run began, None for nothing. full:
    whether anything was in it. thread: whose claim it is."""

    out: Path
    before: tuple[int, int] | None
    full: bool
    thread: int


_CLAIMS: dict[Path, Claim] = {}


@contextmanager
def claim(out: Path, inputs: Sequence[Path] = (), *, overwrite: bool = False) -> Iterator[Claim]:
    """The right to make `out`, for the whole of a run; a claim within a claim of the same thread is the same.

    inputs: folders and files that the run reads. Raises UsageError when `out` may not be written (see `check_target`),
    UserError when another run is at it, naming that, or the disk refuses.
    """
    out = resolved(out)
    mine = _CLAIMS.get(out)
    if mine is not None and mine.thread == threading.get_ident():
        _check_apart(out, inputs)
        yield mine
        return
    check_target(out, inputs, overwrite=overwrite)
    with ExitStack() as stack:
        with _explained(out):
            stack.enter_context(_parents_of(out))
            stack.enter_context(_lock(out))
            clear_abandoned(out.parent, _work_prefix(out), lambda left: _clear_up(left, out))
            check_target(out, inputs, overwrite=overwrite)
            status = out.stat() if out.exists() else None
        before = None if status is None else (status.st_dev, status.st_ino)
        _CLAIMS[out] = Claim(out, before, before is not None and any(out.iterdir()), threading.get_ident())
        stack.callback(_CLAIMS.pop, out)
        yield _CLAIMS[out]


@contextmanager
def staged_folder(out: Path, inputs: Sequence[Path] = (), *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder beside `out`, which becomes `out` when the block ends well and is removed when it does not.

    Its last file has to be a manifest (`ownership.write_manifest`) if the folder is to be replaceable. Raises as `claim`
    does, and InTheWay when something came to `out` meanwhile.
    """
    with claim(out, inputs, overwrite=overwrite) as mine, _explained(mine.out), beside(mine) as folder:
        yield folder
        _sync_tree(folder)
        _publish(folder, mine)


@contextmanager
def beside(mine: Claim) -> Iterator[Path]:
    """An empty private folder on the disk of the claimed folder, removed in the end."""
    with private_folder(mine.out.parent, _work_prefix(mine.out), lambda left: _clear_up(left, mine.out)) as folder:
        yield folder


def check_target(out: Path, inputs: Sequence[Path] = (), *, overwrite: bool = False) -> None:
    """Raises UsageError when `out` overlaps one of `inputs`, is no folder, or is in use and not ours to overwrite."""
    out = resolved(out)
    _check_apart(out, inputs)
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: is a file; choose another output folder")
    if os.path.ismount(out):
        raise UsageError(f"{out}: is where a disk is mounted, which cannot be replaced; choose a folder in it")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out}: not empty; choose another output folder, or pass --overwrite to replace it")
    reason = why_not_ours(out)
    if reason is not None:
        raise UsageError(
            f"{out}: {reason}, and is not replaced; choose another output folder, or move it away yourself"
        )


def resolved(out: Path) -> Path:
    """`out` with its links followed. Raises UsageError for a loop of them, and where the system cannot tell."""
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UsageError(f"{out}: not a place for a folder ({error}); choose another output folder") from error


def _check_apart(out: Path, inputs: Sequence[Path]) -> None:
    """By what folders are, not by how they are spelled: links, mounts and file systems without case have many spellings."""
    for given in inputs:
        source = resolved(given)
        if _same(out, source):
            raise UsageError(f"{out}: output and source are the same folder; choose another output folder")
        if any(_same(it, source) for it in out.parents) or any(_same(it, out) for it in source.parents):
            raise UsageError(f"{out}: output and source ({source}) lie inside one another; choose a folder outside")


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


def hidden_sibling(out: Path, role: str) -> Path:
    """Where a run keeps what the next run on `out` goes on with."""
    return out.parent / f".{out.name}.mla2dsa-{role}"


def _work_prefix(out: Path) -> str:
    return f".{out.name}.mla2dsa-work-"


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(hidden_sibling(out, "lock")))
        except Held as other:
            raise UserError(f"{out}: in use by {other}; wait for it, or choose another output folder") from None
        yield


@contextmanager
def _parents_of(out: Path) -> Iterator[None]:
    """The folders that `out` is to lie in; those that were made for it go again when nothing has come into them."""
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(out.parent)) from error
    try:
        yield
    finally:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


def _publish(folder: Path, mine: Claim) -> None:
    """Give the finished folder its name. Raises InTheWay when that is somebody else's by now."""
    out = mine.out
    try:
        if mine.before is None:
            move_folder(folder, out)
        elif not mine.full:
            os.rename(folder, out)  # replaces an empty folder, and nothing else
        else:
            _replace(folder, mine)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise _kept(folder, out, "something else has come there since the run began") from error
    sync_path(out.parent)


def _replace(folder: Path, mine: Claim) -> None:
    """`folder` takes the place of the one that was there at the beginning, which is left to `_clear_up`."""
    out, aside = mine.out, folder.parent / _OLD
    if not os.path.lexists(out):  # removed meanwhile
        move_folder(folder, out)
        return
    write_new(folder.parent / _NOTE, str(folder.lstat().st_ino))
    if _changed(out, mine) is None and exchange_folders(folder, out):
        reason = _changed(folder, mine)  # looked at again, now that nobody finds it by its name
        if reason is not None:
            exchange_folders(folder, out)
    else:
        reason = _changed(out, mine) or _replace_in_two_steps(folder, mine, aside)
    if reason is not None:
        raise _kept(folder, out, f"{reason}, since the run began")


def _replace_in_two_steps(folder: Path, mine: Claim, aside: Path) -> str | None:
    """Where folders cannot be exchanged at one instant; `_clear_up` mends it if the run is killed between the two."""
    move_folder(mine.out, aside)
    try:
        reason = _changed(aside, mine)
        if reason is None:
            move_folder(folder, mine.out)
            return None
    except BaseException:
        move_folder(aside, mine.out)
        raise
    move_folder(aside, mine.out)
    return reason


def _changed(folder: Path, mine: Claim) -> str | None:
    """Why this is not, or no longer, the folder that was to be replaced."""
    status = folder.lstat()
    if (status.st_dev, status.st_ino) != mine.before:
        return "is another folder"
    return why_not_ours(folder)


def _kept(folder: Path, out: Path, reason: str) -> InTheWay:
    kept = _keep(folder, out, "finished")
    return InTheWay(f"{out}: {reason}, and is left as it is; the finished result is {kept}: move it where you want it")


def _keep(folder: Path, out: Path, role: str) -> Path:
    """Move it to a name beside `out` that everybody sees."""
    kept = out.parent / f"{out.name}.mla2dsa-{role}-{secrets.token_hex(4)}"
    move_folder(folder, kept)
    return kept


def _clear_up(left: Path, out: Path) -> None:
    """Remove a work folder. Beside what was not finished it may hold what was at `out` before, which may have changed."""
    aside, note = left.parent / _OLD, left.parent / _NOTE
    ours = note.read_text() if note.exists() else None
    kept: list[str] = []
    if os.path.lexists(aside) and not os.path.lexists(out):
        move_folder(aside, out)  # killed between the two steps
    for folder in (left, aside):
        if not os.path.lexists(folder):
            continue
        if ours is None or str(folder.lstat().st_ino) == ours:
            remove_tree(folder)  # never had a name that others know
            continue
        reason = remove_ours(folder)
        if reason is not None:
            kept.append(f"{reason}; it is {_keep(folder, out, 'replaced')} now")
    note.unlink(missing_ok=True)
    if kept:
        raise UserError(f"{out}: what was there before {', '.join(kept)}: look at it, then run this again")


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            if os.stat(Path(parent, name)).st_nlink == 1:  # a hard link has nothing of ours to write back
                sync_path(Path(parent, name))
        sync_path(Path(parent))


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """What the disk refuses, in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(_explain(error, out)) from error


def _explain(error: OSError, out: Path) -> str:
    if error.errno in _DISK_FULL:
        return f"{out}: not written, no space left on the disk (nothing stays behind); free some or use another disk"
    where = f" ({error.filename})" if error.filename else ""
    return f"{out}: not written, {error.strerror or error}{where}"
