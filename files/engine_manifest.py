"""`mla2dsa-engine.json`, which says what an engine folder holds and what it takes to run it; checked before it is loaded.

All of the export's manifest but `kind`, `file`, `runs_on` and `weights`, and:

    format          1
    backend         {"name": "tensorrt" | "tensorrt-rtx", "version"}: engines run with this very version
    sms             GPU architectures that it runs on, as 90
    profiles        [{"name", "batch": [least, usual, most], "seq", "cache_length"}] in the engine's order
    ops             {"SparseMLA": {"nodes", "programs": [sha256], "kernels": [sha256]}, ...}
    plugin          {"file", "sha256", "embedded": whether the plan contains it too}
    engine          {"file", "bytes", "sha256"}
    layers          {"total", "plugin"}
    files           [{"name", "size"}]: every other file of the folder, which `--overwrite` may replace
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .digests import file_sha256
from .json_files import read_json

ENGINE_MANIFEST = "mla2dsa-engine.json"
ENGINE_FILES = {ENGINE_MANIFEST, "model.engine", "layers.json", "libmla2dsa_trt.so"}  # beside files of the model
FORMAT = 1
_HASHED = 4 * 2**30  # bytes of an engine up to which it is read once more before it is loaded


def engine_folder(target: str | Path) -> Path | None:
    """The engine folder that `target` (a folder, or an .engine file in one) names; None if it is something else."""
    path = Path(target)
    folder = path.parent if path.suffix == ".engine" else path
    return folder if (folder / ENGINE_MANIFEST).is_file() else None


def read_engine(folder: Path) -> dict[str, Any]:
    """The manifest. Raises UserError when it is of another format."""
    manifest = read_json(folder / ENGINE_MANIFEST)
    if manifest.get("format") != FORMAT:
        found = manifest.get("format")
        raise UserError(
            f"{folder / ENGINE_MANIFEST}: format {found}, this mla2dsa reads {FORMAT}; build the engine again"
        )
    return manifest


def check_engine(folder: Path, manifest: Mapping[str, Any], version: str, sm: int | None) -> None:
    """Whether it can run here. version: of the backend that is installed. sm: of the GPU, None where there is none to ask.

    Raises UserError, one line with what is wrong, what was expected and what to do.
    """
    built = manifest["backend"]
    if built["version"] != version:
        raise UserError(
            f"{folder}: built with {built['name']} {built['version']}, installed is {version}, and an engine runs with the"
            f" version it was built with: install that one, or build again"
        )
    if sm is not None and sm not in manifest["sms"]:
        known = ", ".join(f"sm_{it}" for it in manifest["sms"])
        raise UserError(f"{folder}: built for {known}; this GPU is sm_{sm}: build again with --sm {sm}")
    _check_file(folder, manifest["plugin"], "the plugin library", None)
    _check_file(folder, manifest["engine"], "the engine", _HASHED)


def _check_file(folder: Path, known: Mapping[str, Any], what: str, most: int | None) -> None:
    file = folder / known["file"]
    if not file.is_file():
        raise UserError(f"{file}: missing, it is {what}; build again")
    size = file.stat().st_size
    same = size == known.get("bytes", size)
    if same and (most is None or size <= most):
        same = file_sha256(file) == known["sha256"]
    if not same:
        raise UserError(f"{file}: not {what} that was built ({ENGINE_MANIFEST} says otherwise); build again")
