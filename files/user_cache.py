"""Where what was compiled is kept between runs: MLA2DSA_CACHE, else mla2dsa in XDG_CACHE_HOME, else ~/.cache/mla2dsa.

The folder may be removed at any time. What is kept there is run, so it lies in folders that nobody else may write to.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import UserError


def cache_folder() -> Path:
    """It need not exist. Raises UserError where the user has no home folder and nothing else is named."""
    named = os.environ.get("MLA2DSA_CACHE")
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mla2dsa"
    except RuntimeError:
        raise UserError("no home folder to keep compiled files in (HOME is not set); set MLA2DSA_CACHE") from None


def code_folder(name: str) -> Path:
    """The folder `name` of the cache, made if it is not there, with mode 0700.

    Raises UserError when it is another user's or open to others for writing, OSError as mkdir does.
    """
    cache = cache_folder()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = cache / name
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_ours(cache, stat.S_IWOTH if not cache.stat().st_mode & stat.S_ISVTX else 0)
    _check_ours(folder, stat.S_IWGRP | stat.S_IWOTH)
    if hasattr(os, "geteuid") and folder.stat().st_uid == os.geteuid():
        folder.chmod(0o700)
    return folder


def _check_ours(folder: Path, forbidden: int) -> None:
    """forbidden: bits of the mode that let others put files there."""
    if not hasattr(os, "geteuid"):  # not a POSIX system: it has no such modes
        return
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise UserError(
            f"{folder}: belongs to another user (uid {found.st_uid}), and what is kept there is run; set MLA2DSA_CACHE to a "
            "folder of your own"
        )
    if found.st_mode & forbidden:
        raise UserError(
            f"{folder}: others may write to it (mode {stat.S_IMODE(found.st_mode):04o}), and what is kept there is run; remove "
            "it, or set MLA2DSA_CACHE to another folder"
        )
