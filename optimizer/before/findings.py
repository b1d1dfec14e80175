"""Things that are wrong, collected before any work so that they are told together; and what is to be seen of files alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...errors import SeveralErrors, UsageError, UserError
from ...files.staging import check_target
from ...files.temporary import private_folder
from .space import PROBE, existing_parent

_Result = TypeVar("_Result")
_LONGEST_ADDITION = len("..mla2dsa-finished-") + 16  # to OUT's name, for the hidden folders beside it


@dataclass
class Findings:
    """Collects what is wrong; as a context manager, raises it all when the block ends."""

    errors: list[UserError] = field(default_factory=list)

    def collect(self, call: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result | None:
        """What `call` returns; None where it raises a UserError, which is kept."""
        try:
            return call(*arguments, **options)
        except UserError as error:
            self.add(error)
            return None

    def add(self, error: UserError) -> None:
        if str(error) not in map(str, self.errors):
            self.errors.append(error)

    def __enter__(self) -> Findings:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None and len(self.errors) == 1:
            raise self.errors[0]
        if kind is None and self.errors:
            raise SeveralErrors(self.errors)


def check_out(found: Findings, inputs: Sequence[Path], out: Path, overwrite: bool) -> None:
    """Whether `out` can be made, written and renamed into place."""
    real = Path(os.path.realpath(out))
    parent = existing_parent(real.parent)
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if len(os.fsencode(real.name)) + _LONGEST_ADDITION > longest:
        found.add(
            UsageError(
                f"{real}: its name is too long, expected at most {longest - _LONGEST_ADDITION} bytes; shorten it"
            )
        )
        return
    found.collect(check_target, out, inputs, overwrite=overwrite)
    if not parent.is_dir():
        found.add(UserError(f"{parent}: Not a directory, so {real} cannot be made in it; choose another output folder"))
        return
    try:
        with private_folder(parent, PROBE):
            pass
    except OSError as error:  # read-only, not ours, no inode left: only trying says
        found.add(
            UserError(
                f"{parent}: cannot be written to ({error.strerror}), so {real} cannot be made; choose another folder"
            )
        )


def check_text(found: Findings, path: str | None) -> None:
    """Text that the user named: a file, or a folder of files, that can be read; a pipe would be waited for."""
    if path is None:
        return
    place = Path(path)
    if not os.path.exists(place):
        found.add(UserError(f"{place}: no such file or folder of text"))
        return
    files = [place] if not place.is_dir() else sorted(it for it in place.rglob("*") if not it.is_dir())
    for file in files:
        if not (file.exists() and stat.S_ISREG(file.stat().st_mode)):
            found.add(UserError(f"{file}: neither a file nor a folder of files, expected text; remove it"))
        elif not os.access(file, os.R_OK):
            found.add(UserError(f"{file}: cannot be read (Permission denied), expected text"))
