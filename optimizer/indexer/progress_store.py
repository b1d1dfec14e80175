"""Finished layers of an unfinished conversion, so that a killed run can be resumed.

.<out>.layers/state.json                         fingerprint of checkpoint, recipe and calibration text
.<out>.layers/model.layers.0.self_attn.safetensors   that layer's indexer, its result in the metadata
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError, UserError
from ...kernels.spec import IndexerWeights
from .calibrate import LayerResult

_STATE = "state.json"


@dataclass(frozen=True)
class ProgressStore:
    """A hidden folder beside the output."""

    folder: Path

    @classmethod
    def check(cls, out: Path, resume: bool, overwrite: bool) -> ProgressStore:
        """The store of `out`, untouched. Raises UsageError when it holds layers and nothing says what to do with them."""
        out = out.resolve()
        store = cls(out.parent / f".{out.name}.layers")
        if store.layers() and not (resume or overwrite):
            raise UsageError(
                f"{out}: an unfinished conversion was found; pass --resume to go on with it or --overwrite to start again"
            )
        return store

    @classmethod
    def open(cls, out: Path, fingerprint: str, resume: bool, overwrite: bool) -> ProgressStore:
        """The store of `out`, ready to be written. Raises UsageError as `check` does, or when it is of another conversion."""
        store = cls.check(out, resume, overwrite)
        if overwrite or not store.layers():  # without a layer there is nothing to go on with
            store.remove()
        elif store._fingerprint() != fingerprint:
            raise UsageError(
                f"{out}: the unfinished conversion is of another model, recipe or text; pass --overwrite to start again"
            )
        store._start(fingerprint)
        return store

    def layers(self) -> list[Path]:
        """The files of the layers that are finished."""
        return sorted(self.folder.glob("*.safetensors"))

    def _fingerprint(self) -> str | None:
        try:
            state: dict[str, Any] = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            return str(state["fingerprint"])
        except (OSError, ValueError, KeyError):
            return None

    def _start(self, fingerprint: str) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / _STATE, json.dumps({"fingerprint": fingerprint}).encode())
        except OSError as error:
            self.remove_if_empty()
            raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def save(self, result: LayerResult) -> None:
        """Keep one layer. Raises UserError when the disk is full."""
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in result.weights.tensors().items()}
        try:
            _write(self._file(result.name), save(tensors, {"result": json.dumps(result.summary())}))
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); free some space, then pass --resume"
            ) from error

    def load(self) -> dict[str, LayerResult]:
        """Every layer that was finished, by name. Raises UserError when a file was damaged since."""
        results = [_read(file) for file in self.layers()]
        return {result.name: result for result in results}

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """A conversion that failed before its first layer leaves nothing to resume."""
        if not self.layers():
            self.remove()

    def _file(self, layer: str) -> Path:
        return self.folder / f"{layer.replace('/', '_')}.safetensors"


def _read(file: Path) -> LayerResult:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            weights = IndexerWeights.from_tensors({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
            return LayerResult(weights=weights, **json.loads(opened.metadata()["result"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it to calibrate that layer again") from error


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all: a layer file that exists is complete."""
    partial = file.with_suffix(".partial")
    try:
        with partial.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        partial.rename(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
