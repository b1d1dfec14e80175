"""Finished layers of an unfinished conversion, so that a killed run can be resumed.

.<out>.mla2dsa-layers/model.layers.0.self_attn.safetensors   that layer's indexer; its result and the fingerprint of checkpoint,
                                                             recipe and calibration text in the metadata

Every file says what it belongs to: a layer of another conversion is never taken for one of this.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError, UserError
from ...files.staging import hidden_sibling, resolved
from ...files.temporary import remove_tree, replace_file
from ...kernels.spec import IndexerWeights
from .calibrate import LayerResult


@dataclass(frozen=True)
class ProgressStore:
    """A hidden folder beside the output, whose claim the run holds. fingerprint: of the conversion that it works on."""

    folder: Path
    fingerprint: str

    @classmethod
    def check(cls, out: Path, resume: bool, overwrite: bool) -> None:
        """Raises UsageError when there are layers for `out` and nothing says what to do with them."""
        if cls(_place(out), "").layers() and not (resume or overwrite):
            raise UsageError(
                f"{resolved(out)}: an unfinished conversion was found; pass --resume to go on with it or --overwrite to start again"
            )

    @classmethod
    def open(cls, out: Path, fingerprint: str, resume: bool, overwrite: bool) -> ProgressStore:
        """The store of `out`, ready to be written. Raises UsageError as `check` does, or when it is of another conversion; with
        both `resume` and `overwrite`, that one is given up."""
        cls.check(out, resume, overwrite)
        store = cls(_place(out), fingerprint)
        if not store.layers() or (overwrite and not (resume and store.load())):
            store.remove()  # without a layer there is nothing to go on with
        elif not store.load():
            raise UsageError(
                f"{resolved(out)}: the unfinished conversion is of another model, recipe or text; pass --overwrite to start again"
            )
        try:
            store.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{store.folder}: cannot be written ({error.strerror})") from error
        return store

    def layers(self) -> list[Path]:
        """The files of the layers that are finished."""
        return sorted(self.folder.glob("*.safetensors"))

    def save(self, result: LayerResult) -> None:
        """Keep one layer. Raises UserError when the disk is full."""
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in result.weights.tensors().items()}
        about = {"fingerprint": self.fingerprint, "result": json.dumps(result.summary())}
        try:
            replace_file(self._file(result.name), save(tensors, about), sync=True)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); free some space, then pass --resume"
            ) from error

    def load(self) -> dict[str, LayerResult]:
        """Every finished layer of this conversion, by name. Raises UserError when a file was damaged since."""
        results = [_read(file, self.fingerprint) for file in self.layers()]
        return {result.name: result for result in results if result is not None}

    def remove(self) -> None:
        remove_tree(self.folder)

    def remove_if_empty(self) -> None:
        """A conversion that failed before its first layer leaves nothing to resume."""
        if not self.layers():
            self.remove()

    def _file(self, layer: str) -> Path:
        return self.folder / f"{layer.replace('/', '_')}.safetensors"


def _place(out: Path) -> Path:
    return hidden_sibling(resolved(out), "layers")


def _read(file: Path, fingerprint: str) -> LayerResult | None:
    """None if it is of another conversion."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
            if about["fingerprint"] != fingerprint:
                return None
            weights = IndexerWeights.from_tensors({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
            return LayerResult(weights=weights, **json.loads(about["result"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it to calibrate that layer again") from error
