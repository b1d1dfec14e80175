"""`mla2dsa-export.json`, the manifest of an exported folder (what it means: `optimizer/export.py`), checked by its schema."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field, model_validator

from ...errors import UserError
from ..digests import file_digest
from ..onnx_file import read_onnx
from .schema import Bytes, Digest, Entries, FileName, Manifest, Sha256, Size, Strict, Text, read_manifest

EXPORT_MANIFEST = "mla2dsa-export.json"
EXPORT_FILES = {EXPORT_MANIFEST, "model.onnx", "model.data", "model.pt2"}  # beside files of the checkpoint
FORMAT = 1
_TOKENS = ("input_ids", "position_ids", "slots", "key_begin", "last")


class Value(Strict):
    """An input or output. shape: numbers and names of open dims."""

    name: Text
    dtype: Literal["int64", "float32", "float16", "bfloat16"]
    shape: Annotated[list[Size | Literal["batch", "seq", "cache_length"]], Field(max_length=8)]


class CachePart(Strict):
    """One cache of a layer, [batch, cache_length, width]."""

    input: Text
    output: Text
    width: Size

    @model_validator(mode="after")
    def _paired(self) -> CachePart:
        if self.input.removeprefix("past_") != self.output.removeprefix("present_") or self.input == self.output:
            raise ValueError("input and output are not past_X and present_X of one cache")
        return self


class Cache(Strict):
    """A layer's caches. index_key: null in a layer that attends to what the last layer before it with index keys selected."""

    layer: Text
    latent: CachePart
    index_key: CachePart | None

    @property
    def parts(self) -> list[CachePart]:
        return [self.latent] if self.index_key is None else [self.latent, self.index_key]


class Limits(Strict):
    max_batch: Size
    max_seq: Size


class Model(Strict):
    model_type: Text | None
    vocab_size: Size
    num_hidden_layers: Size | None
    context: Size
    bos_token_id: int | list[int] | None
    eos_token_id: list[int]


class Indexer(Strict):
    index_topk: Size
    index_n_heads: Size
    index_head_dim: Size
    rope_interleave: bool


class Source(Strict):
    name: Text
    fingerprint: Sha256
    files: Annotated[dict[FileName, Digest], Entries]


class Runnable(Manifest):
    """What an exported graph and an engine have in common: how they are called. Told more than once, and always the same."""

    dtype: Literal["float32", "float16", "bfloat16"]
    logits: Literal["last", "all"]
    inputs: Annotated[list[Value], Entries]
    outputs: Annotated[list[Value], Entries]
    caches: Annotated[list[Cache], Field(min_length=1, max_length=10_000)]
    limits: Limits
    model: Model
    indexer: Indexer
    source: Source

    @model_validator(mode="after")
    def _consistent(self) -> Runnable:
        if len({cache.layer for cache in self.caches}) != len(self.caches):
            raise ValueError("caches: two are of one layer")
        if self.caches[0].index_key is None:
            raise ValueError("caches: the first layer has no index_key, and no layer before it has selected")
        parts = [part for cache in self.caches for part in cache.parts]
        self._check_values("inputs", self.inputs, {part.input: part.width for part in parts}, self._tokens())
        length: Literal[1, "seq"] = 1 if self.logits == "last" else "seq"
        logits = Value(name="logits", dtype=self.dtype, shape=["batch", length, self.model.vocab_size])
        self._check_values("outputs", self.outputs, {part.output: part.width for part in parts}, [logits])
        if self.outputs[0] != logits:
            raise ValueError("outputs: the first is not the logits")
        if self.limits.max_seq > self.model.context:
            raise ValueError("limits.max_seq is more than model.context")
        return self

    def _tokens(self) -> list[Value]:
        names = _TOKENS if self.logits == "last" else _TOKENS[:-1]
        rows = ("key_begin", "last")
        return [
            Value(name=name, dtype="int64", shape=["batch"] if name in rows else ["batch", "seq"]) for name in names
        ]

    def _check_values(self, field: str, found: list[Value], widths: dict[str, int], others: list[Value]) -> None:
        wanted = {value.name: value for value in others}
        for name, width in widths.items():
            wanted[name] = Value(name=name, dtype=self.dtype, shape=["batch", "cache_length", width])
        if len(wanted) != len(widths) + len(others) or len(found) != len(wanted):
            raise ValueError(f"{field} and caches list different tensors")
        for value in found:
            known = wanted.get(value.name)
            if known is None or (known.dtype, known.shape) != (value.dtype, value.shape):
                raise ValueError(f"{field}: {value.name[:60]} is not what dtype, logits, caches and model say of it")


class WrittenTensor(Strict):
    name: Text
    bytes: Bytes
    reason: Text


class Weights(Strict):
    linked_files: Annotated[list[FileName], Entries]
    zero_copy_bytes: Bytes
    written_bytes: Bytes
    written: Annotated[list[WrittenTensor], Entries]


class ExportManifest(Runnable):
    kind: Literal["onnx", "pt2"]
    file: FileName
    digest: Digest | None = None
    runs_on: Annotated[list[Text], Field(max_length=16)]
    weights: Weights

    @model_validator(mode="after")
    def _weights_are_known(self) -> ExportManifest:
        if unknown := [name for name in self.weights.linked_files if name not in self.source.files]:
            raise ValueError(f"weights.linked_files has {unknown[0][:60]}, source.files does not")
        return self


def is_export(folder: str | Path) -> bool:
    return (Path(folder) / EXPORT_MANIFEST).exists()


def read_export(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of an exported folder. Raises UserError when there is none, it is damaged, or the model is of another kind
    than `kind`."""
    if not is_export(folder):
        raise UserError(f"{folder}: not an exported folder ({EXPORT_MANIFEST} missing); run `mla2dsa export` first")
    manifest = read_manifest(folder / EXPORT_MANIFEST, ExportManifest, FORMAT, "export again")
    if kind not in (None, manifest["kind"]):
        runtime = "--runtime torch" if manifest["kind"] == "pt2" else "--runtime onnxruntime"
        raise UserError(
            f"{folder}: holds a {manifest['kind']} export, this runtime takes {kind}; pass {runtime}, or export again "
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
        file, known = folder / name, manifest["source"]["files"][name]
        if not file.exists():
            raise UserError(f"{file}: missing, and the model's weights are in it; export again, or put the file back")
        if file_digest(file) != known:
            raise UserError(f"{file}: not the file this model was exported from (its digest differs); export again")


def check_model_file(file: Path, stream: BinaryIO, manifest: Mapping[str, Any]) -> None:
    """Whether `stream`, the opened `file`, is the model that was exported; it is at its beginning again. Raises UserError."""
    known = manifest.get("digest")  # absent from exports of earlier versions
    if known is None:
        return
    found = hashlib.sha256(stream.read(known["hashed"])).hexdigest()
    if (stream.seek(0, os.SEEK_END), found) != (known["size"], known["sha256"]):
        raise UserError(f"{file}: not the model that was exported (its digest differs); export again")
    stream.seek(0)


def read_onnx_export(folder: Path, manifest: Mapping[str, Any]) -> bytes:
    """The exported model: what is run has to be these very bytes, which are the ones that were written. Raises UserError."""
    file = folder / manifest["file"]
    data = read_onnx(file)
    check_model_file(file, io.BytesIO(data), manifest)
    return data


def export_folder(target: str | Path) -> Path | None:
    """The export that `target` (its folder, or the .onnx file in it) names. Raises UserError for an .onnx file of another origin."""
    path = Path(target)
    if path.suffix == ".onnx":
        if not is_export(path.parent):
            raise UserError(
                f"{path}: no {EXPORT_MANIFEST} beside it, so it is no export of mla2dsa; run `mla2dsa export`"
            )
        return path.parent
    return path if is_export(path) else None
