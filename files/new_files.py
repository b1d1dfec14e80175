"""Files that are written once: never onto one that is there."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError, UserError


def check_new_folder(folder: Path, flag: str) -> None:
    """Raises UsageError, naming the command line's `flag`, when `folder` is there and not an empty folder."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{flag} {folder}: is a file, expected a new or an empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{flag} {folder}: not empty, expected a new or an empty folder; choose another one")


def write_new(file: Path, text: str) -> None:
    """Raises UserError when the file is there already, or the disk refuses. Its folder is made."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UserError(f"{file}: is there already, and is not replaced; choose another folder") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error
