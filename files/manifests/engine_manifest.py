"""`mla2dsa-engine.json`, which says what an engine folder holds and what it takes to run it; checked before it is loaded.

An engine folder is code: its plugin library is loaded into the process, and hashes in its own manifest prove nothing about who
made both. They find damage, not malice.

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

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...errors import UserError
from ..regular import open_regular
from .export_manifest import Runnable
from .schema import Bytes, Entries, FileName, Sha256, Size, Strict, Text, read_manifest

ENGINE_MANIFEST = "mla2dsa-engine.json"
ENGINE_FILES = {ENGINE_MANIFEST, "model.engine", "layers.json", "libmla2dsa_trt.so"}  # beside files of the model
FORMAT = 1
_REMEDY = "build the engine again"
_Range = Annotated[list[Size], Field(min_length=3, max_length=3)]


class Backend(Strict):
    name: Literal["tensorrt", "tensorrt-rtx"]
    version: Text


class Profile(Strict):
    """An optimisation profile: [least, usual, most] of each open dim."""

    name: Text
    batch: _Range
    seq: _Range
    cache_length: _Range

    @model_validator(mode="after")
    def _ordered(self) -> Profile:
        if any(sizes != sorted(sizes) for sizes in (self.batch, self.seq, self.cache_length)):
            raise ValueError("expected [least, usual, most] of each dim")
        return self


class Op(Strict):
    nodes: Size
    programs: Annotated[list[Sha256], Entries]
    kernels: Annotated[list[Sha256], Entries]


class Plugin(Strict):
    file: FileName
    sha256: Sha256
    embedded: bool


class Engine(Strict):
    file: FileName
    bytes: Bytes
    sha256: Sha256


class Layers(Strict):
    total: Bytes
    plugin: Bytes


class EngineManifest(Runnable):
    backend: Backend
    sms: Annotated[list[Size], Field(max_length=100)]
    profiles: Annotated[list[Profile], Field(min_length=1, max_length=100)]
    ops: Annotated[dict[Text, Op], Entries]
    plugin: Plugin
    engine: Engine
    layers: Layers


def engine_folder(target: str | Path) -> Path | None:
    """The engine folder that `target` (a folder, or an .engine file in one) names; None if it is something else."""
    path = Path(target)
    folder = path.parent if path.suffix == ".engine" else path
    return folder if (folder / ENGINE_MANIFEST).exists() else None


def read_engine(folder: Path) -> dict[str, Any]:
    """The manifest. Raises UserError when it is of another format, or damaged."""
    return read_manifest(folder / ENGINE_MANIFEST, EngineManifest, FORMAT, _REMEDY)


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


def read_plugin(folder: Path, manifest: Mapping[str, Any]) -> bytes:
    """The plugin library that the manifest names: what is loaded has to be these very bytes. Raises UserError."""
    return _read_checked(folder, manifest["plugin"], "the plugin library")


def read_plan(folder: Path, manifest: Mapping[str, Any]) -> bytes:
    """The engine that the manifest names. Raises UserError."""
    return _read_checked(folder, manifest["engine"], "the engine")


def _read_checked(folder: Path, known: Mapping[str, Any], what: str) -> bytes:
    """Read once: nobody can put another file in its place between the check and the use."""
    file = folder / known["file"]
    try:
        with open_regular(file) as stream:
            data = stream.read()
    except FileNotFoundError:
        raise UserError(f"{file}: missing, it is {what}; build again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != known["sha256"]:
        raise UserError(f"{file}: not {what} that was built ({ENGINE_MANIFEST} says otherwise); build again")
    return data
