"""The manifest of an exported folder, as runtimes read it (what it holds: `optimizer/export.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from .digests import file_digest
from .json_files import read_json

EXPORT_MANIFEST = "mla2dsa-export.json"
EXPORT_FILES = {EXPORT_MANIFEST, "model.onnx", "model.data", "model.pt2"}  # beside files of the checkpoint


def is_export(folder: str | Path) -> bool:
    return (Path(folder) / EXPORT_MANIFEST).is_file()


def read_export(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of an exported folder. Raises UserError when there is none, or the model is of another kind."""
    if not is_export(folder):
        raise UserError(f"{folder}: not an exported folder ({EXPORT_MANIFEST} missing); run `mla2dsa export` first")
    manifest = read_json(folder / EXPORT_MANIFEST)
    if manifest.get("kind") != kind:
        runtime = "--runtime torch" if manifest.get("kind") == "pt2" else "--runtime onnxruntime"
        raise UserError(
            f"{folder}: holds a {manifest.get('kind')} export, this runtime takes {kind}; pass {runtime}, or export again "
            f"with --format {kind}"
        )
    return manifest


def check_limits(folder: Path, manifest: dict[str, Any], batch: int, capacity: int | None) -> int:
    """The capacity to use (None: the most it was exported for). Raises UserError beyond the export's limits."""
    limits = manifest["limits"]
    if batch > limits["max_batch"]:
        raise UserError(
            f"{folder}: batch {batch} is over the maximum of {limits['max_batch']} it was exported for (--max-batch)"
        )
    if capacity is not None and capacity > limits["max_seq"]:
        raise UserError(
            f"{folder}: a cache of {capacity} tokens is over the maximum of {limits['max_seq']} it was exported for (--max-seq)"
        )
    return capacity or int(limits["max_seq"])


def check_weight_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Weights lie in the checkpoint's own files: the graph is worthless over any others. Raises UserError."""
    if not (folder / manifest["file"]).is_file():
        raise UserError(f"{folder / manifest['file']}: missing; export again")
    for name in manifest["weights"]["linked_files"]:
        file, known = folder / name, manifest["source"]["files"].get(name)
        if not file.is_file():
            raise UserError(f"{file}: missing, and the model's weights are in it; export again, or put the file back")
        if known is not None and file_digest(file) != known:
            raise UserError(f"{file}: not the file this model was exported from (its digest differs); export again")
