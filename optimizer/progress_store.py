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

from ..errors import UsageError, UserError
from ..kernels.spec import IndexerWeights
from .calibrate import LayerResult

_STATE = "state.json"


@dataclass(frozen=True)
class ProgressStore:
    """A hidden folder beside the output."""

    folder: Path

    @classmethod
    def open(cls, out: Path, fingerprint: str, resume: bool, overwrite: bool) -> ProgressStore:
        """Raises UsageError when an unfinished conversion is there and nothing says what to do with it, or it is another one."""
        out = out.resolve()
        store = cls(out.parent / f".{out.name}.layers")
        found = store._fingerprint()
        if found is not None and overwrite:
            store.remove()
        elif found is not None and not resume:
            raise UsageError(
                f"{out}: an unfinished conversion was found; pass --resume to go on with it or --overwrite to start again"
            )
        elif found is not None and found != fingerprint:
            raise UsageError(
                f"{out}: the unfinished conversion is of another model, recipe or text; pass --overwrite to start again"
            )
        elif found is None and store.folder.exists():
            store.remove()  # killed before it had written its state: there is nothing in it
        store._start(fingerprint)
        return store

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
        """Every layer that was finished, by name."""
        from safetensors import safe_open

        done = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                weights = IndexerWeights.from_tensors({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
                result = LayerResult(weights=weights, **json.loads(opened.metadata()["result"]))
            done[result.name] = result
        return done

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, layer: str) -> Path:
        return self.folder / f"{layer.replace('/', '_')}.safetensors"


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all: a layer file that exists is complete."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    partial.rename(file)
