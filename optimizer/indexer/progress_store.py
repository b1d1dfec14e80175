"""Finished layers of an unfinished conversion, so that a killed run can be resumed.

.<out>.mla2dsa-layers/model.layers.0.self_attn.safetensors   that layer's indexer; its result and the fingerprint of checkpoint,
                                                             text and what the recipe says of it in the metadata
                      model.layers.0.self_attn+2.safetensors one that the next two layers share with it

Every file says what it belongs to: a layer of another conversion is never taken for one of this. Where the recipe changed for some
layers, those are made again and the others kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError, UserError
from ...files.staging import hidden_sibling, resolved
from ...files.temporary import remove_tree, replace_file
from ...kernels.spec import IndexerWeights
from .calibrate import LayerResult


@dataclass(frozen=True)
class ProgressStore:
    """A hidden folder beside the output, whose claim the run holds. fingerprints: by layer, of all that its indexer depends on in the
    conversion that is worked on. A layer that another recipe, model or text gave stays until this one's takes its place."""

    folder: Path
    fingerprints: Mapping[str, str]

    @classmethod
    def check(cls, out: Path, resume: bool, overwrite: bool) -> None:
        """Raises UsageError when there are layers for `out` and nothing says what to do with them."""
        if cls(_place(out), {}).layers() and not (resume or overwrite):
            raise UsageError(
                f"{resolved(out)}: an unfinished conversion was found; pass --resume to go on with it or --overwrite to start again"
            )

    @classmethod
    def open(cls, out: Path, fingerprints: Mapping[str, str], resume: bool, overwrite: bool) -> ProgressStore:
        """The store of `out`, ready to be written. Raises UsageError as `check` does, or when no layer in it is of this conversion;
        with both `resume` and `overwrite`, they are given up."""
        cls.check(out, resume, overwrite)
        store = cls(_place(out), fingerprints)
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
        """The files of finished layers, of this conversion or another."""
        return sorted(self.folder.glob("*.safetensors"))

    def finished(self) -> list[Path]:
        """Those of this conversion."""
        return [file for file in self.layers() if _is_of(file, self.fingerprints)]

    def save(self, result: LayerResult) -> None:
        """Keep one layer. Raises UserError when the disk is full."""
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in result.weights.tensors().items()}
        about = {"fingerprint": self.fingerprints[result.name], "result": json.dumps(result.summary())}
        try:
            replace_file(self._file(result.key), save(tensors, about), sync=True)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); free some space, then pass --resume"
            ) from error

    def load(self) -> dict[str, LayerResult]:
        """Every finished layer of this conversion, by its key. Raises UserError when a file was damaged since."""
        results = [_read(file, self.fingerprints) for file in self.layers()]
        return {result.key: result for result in results if result is not None}

    def remove(self) -> None:
        remove_tree(self.folder)

    def remove_if_empty(self) -> None:
        """A conversion that failed before its first layer leaves nothing to resume."""
        if not self.layers():
            self.remove()

    def _file(self, key: str) -> Path:
        return self.folder / f"{key.replace('/', '_')}.safetensors"


def _place(out: Path) -> Path:
    return hidden_sibling(resolved(out), "layers")


def _is_of(file: Path, fingerprints: Mapping[str, str]) -> bool:
    with _opened(file) as opened:
        return _result(opened, fingerprints) is not None


def _read(file: Path, fingerprints: Mapping[str, str]) -> LayerResult | None:
    """None if it is of another conversion."""
    with _opened(file) as opened:
        result = _result(opened, fingerprints)
        if result is None:
            return None
        weights = IndexerWeights.from_tensors({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        return LayerResult(weights=weights, **result)


def _result(opened: Any, fingerprints: Mapping[str, str]) -> dict[str, Any] | None:
    """What the file says beside its weights; None if it is of another conversion."""
    about = opened.metadata()
    result: dict[str, Any] = json.loads(about["result"])
    return result if about["fingerprint"] == fingerprints.get(result["name"]) else None


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Raises UserError for what is no layer, found now or in the block."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it to calibrate that layer again") from error
