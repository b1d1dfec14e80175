"""Which folders are ours to replace: those whose manifest lists every file in them.

    "files": [{"name": "model.onnx", "size": 1234}, ...]    relative names, with / between folders; the manifest itself is not listed

What somebody has put into such a folder since is not on the list, and then the folder is his.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError
from .json_files import read_json
from .regular import is_inside
from .writing import write_json

FILES_MANIFEST = "mla2dsa-files.json"  # of folders that have no other
_MANIFESTS = ("mla2dsa.json", "mla2dsa-export.json", "mla2dsa-engine.json", FILES_MANIFEST)
_PACK_MANIFEST, _PACK_ENTRIES = "manifest.json", {"format", "kernels", "programs"}  # a name that others use, too


def write_manifest(folder: Path, name: str, content: Mapping[str, Any], indent: int = 2) -> dict[str, Any]:
    """The manifest of `folder`, whose other files are all in place: `content` and the list of them. Returns what was written."""
    listed = [{"name": file, "size": (folder / file).stat().st_size} for file in sorted(_files(folder))]
    whole = {**content, "files": listed}
    write_json(folder / name, whole, indent)
    return whole


def refuse_names(source: Path, names: Iterable[str], ours: Iterable[str]) -> None:
    """names: of files of `source` that are to lie in an output folder, beside `ours`, which we write there. Raises UserError when
    two would have one name (on a file system without case, too)."""
    taken = {name.casefold(): name for name in ours}
    for name in names:
        first = PurePosixPath(name).parts[0]
        if first.casefold() in taken:
            needed = taken[first.casefold()]
            raise UserError(f"{source / first}: the output needs the name {needed} for a file of its own; rename it")


def why_not_ours(folder: Path) -> str | None:
    """None if `folder` holds a manifest of ours and nothing that it does not list; else the reason, as a phrase."""
    if folder.is_symlink() or not folder.is_dir():
        return "is not a folder"
    name = _manifest_of(folder)
    if name is None:
        return f"holds no manifest of mla2dsa (as {_MANIFESTS[0]}), so mla2dsa did not write it"
    try:
        listed = _listed(read_json(folder / name))
    except UserError:
        listed = None
    if listed is None:
        return f"holds a {name} that does not list the folder's files (damaged, or of an older mla2dsa)"
    strange = next(_strange(folder, {*listed, name}), None)
    return None if strange is None else f"holds {strange}, which mla2dsa did not write ({name} does not list it)"


def remove_ours(folder: Path) -> str | None:
    """Remove the files that the folder's manifest lists, and the folder. Returns what came into it meanwhile and stays, or why
    it is not ours."""
    reason = why_not_ours(folder)
    if reason is not None:
        return reason
    manifest = str(_manifest_of(folder))
    listed = sorted(_listed(read_json(folder / manifest)) or ())
    for file in [*listed, manifest]:  # the manifest last: a folder that is half removed is still known as ours
        (folder / file).unlink(missing_ok=True)
    try:
        for inner in sorted(_parents({*listed, manifest}), reverse=True):
            (folder / inner).rmdir()
    except OSError as error:
        return f"holds {error.filename}, which mla2dsa did not write"
    return None


def _manifest_of(folder: Path) -> str | None:
    for name in (*_MANIFESTS, _PACK_MANIFEST):
        file = folder / name
        if file.is_symlink() or not file.is_file():
            continue
        if name != _PACK_MANIFEST or _is_pack(file):
            return name
    return None


def _is_pack(file: Path) -> bool:
    try:
        return read_json(file).keys() >= _PACK_ENTRIES
    except UserError:
        return False


def _listed(manifest: Mapping[str, Any]) -> set[str] | None:
    """None when there is no list, or one that leads out of the folder."""
    entries = manifest.get("files")
    if not isinstance(entries, list):
        return None
    names = {entry.get("name") if isinstance(entry, dict) else None for entry in entries}
    if not all(isinstance(name, str) and is_inside(name) for name in names):
        return None
    return {str(name) for name in names}


def _parents(names: set[str]) -> set[str]:
    """The folders that the files lie in, "." among them."""
    return {str(parent) for name in names for parent in PurePosixPath(name).parents}


def _files(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name).relative_to(folder).as_posix() for name in names)


def _strange(folder: Path, listed: set[str]) -> Iterator[str]:
    """Whatever is neither a regular file of the list nor a folder with one, or lies on another disk."""
    folders, device = _parents(listed), folder.stat().st_dev
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                is_folder = entry.is_dir(follow_symlinks=False)
                known = name in folders if is_folder else entry.is_file(follow_symlinks=False) and name in listed
                if not known or entry.stat(follow_symlinks=False).st_dev != device:
                    yield name
                elif is_folder:
                    waiting.append(Path(entry.path))
