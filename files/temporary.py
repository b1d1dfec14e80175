"""Private folders for what is not finished: randomly named, locked while in use, and cleared by the next run when not.

<parent>/<prefix><random>/lock    held while the folder is in use
<parent>/<prefix><random>/in/     what the caller works in
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from .locks import Held, abandoned, locked
from .writing import write_new

_PARTIAL = ".mla2dsa-partial-"  # beside files that are kept in a cache
_LOCK, _INSIDE = "lock", "in"
_TRIES = 100
Discard = Callable[[Path], None]


def remove_tree(folder: Path) -> None:
    """Of what was private to us and never published. What cannot be removed now is left to the next run."""
    shutil.rmtree(folder, ignore_errors=True)


def nameless_file(place: Path) -> BinaryIO:
    """An open file on the file system of `place` that has no name: whatever ends the process, nothing is left of it."""
    return cast(BinaryIO, tempfile.TemporaryFile(dir=place))


@contextmanager
def private_folder(parent: Path, prefix: str, discard: Discard = remove_tree) -> Iterator[Path]:
    """An empty folder in `parent` (which exists), removed with what is in it when the block ends; whatever killed runs have
    left under the same prefix goes first. discard: how a folder is removed, if it is there. Raises OSError when none can be
    made."""
    clear_abandoned(parent, prefix, discard)
    with ExitStack() as stack:
        place = _made(parent, prefix, stack)
        inside = place / _INSIDE
        stack.callback(discard, inside)
        inside.mkdir()
        yield inside


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A private folder for temporary files of another program, where the system keeps those."""
    with private_folder(Path(tempfile.gettempdir()), f"mla2dsa-{os.getuid()}-{purpose}-") as folder:
        yield folder


def clear_abandoned(parent: Path, prefix: str, discard: Discard = remove_tree) -> None:
    """Remove the private folders that nobody works in any more."""
    with os.scandir(parent) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(prefix) and _is_ours(entry)]
    for place in found:
        if abandoned(place / _LOCK):
            with suppress(Held, FileNotFoundError), locked(place / _LOCK):
                discard(place / _INSIDE)
        _remove_if_empty(place)  # fails where it is in use


def replace_file(file: Path, content: bytes | memoryview, *, sync: bool = False) -> None:
    """Put `content` in the place of `file`, whole or not at all. sync: it is on the disk then, too."""
    with private_folder(file.parent, _PARTIAL) as folder:
        made = folder / "content"
        write_new(made, content)
        if sync:
            sync_path(made)
        move_file(made, file)


def move_file(made: Path, file: Path) -> None:
    """Give a file that was made in a private folder its name; what had that name goes, and what a link there leads to stays."""
    os.replace(made, file)


@contextmanager
def cache_entry(parent: Path) -> Iterator[Path]:
    """A private folder to make an entry of a cache in; `parent` is made if need be."""
    parent.mkdir(parents=True, exist_ok=True)
    with private_folder(parent, _PARTIAL) as folder:
        yield folder


def sync_path(path: Path) -> None:
    """Have a file or folder written to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _made(parent: Path, prefix: str, stack: ExitStack) -> Path:
    """A new folder whose lock we hold until `stack` ends; then it goes."""
    for _ in range(_TRIES):
        place = parent / f"{prefix}{secrets.token_hex(4)}"
        try:
            place.mkdir(mode=0o700)
            lock = locked(place / _LOCK)
            lock.__enter__()
        except (FileExistsError, FileNotFoundError, Held):  # a run that clears up took it for abandoned
            continue
        stack.callback(_remove_if_empty, place)
        stack.push(lock)
        return place
    raise OSError(errno.EBUSY, "no temporary folder can be made", str(parent))


def _remove_if_empty(place: Path) -> None:
    with suppress(OSError):
        place.rmdir()
