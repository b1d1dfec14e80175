"""`mla2dsa.json`, which says what a DSA checkpoint was made from: what `strip` restores, and the dense config.json."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...errors import UserError
from .schema import Bytes, Digest, Entries, FileName, Manifest, RelativePath, Sha256, Size, Strict, Text, read_manifest

CHECKPOINT_MANIFEST = "mla2dsa.json"
FORMAT = 2  # 1: without `layout`, every shard a link
_READ = (1, 2)
_REMEDY = "fetch it again, or convert again"
_CONFIG = "config.json"


class PlacedFile(Digest):
    """A file of the dense checkpoint. name: here; source_name: there; placed: "hardlink", "reflink" or "copy", or "rewritten" for a
    shard that lacks what was made anew or dropped (then the digest is the source's, of the whole file)."""

    name: RelativePath
    source_name: RelativePath
    placed: Text


class Source(Strict):
    """The dense checkpoint. config: the text of its config.json; files: all others of the model;
    left_out: what was no part of it."""

    config: str
    config_sha256: Sha256 | None = None
    files: Annotated[list[PlacedFile], Entries]
    left_out: Annotated[list[Text], Entries] | None = None

    @model_validator(mode="after")
    def _restorable(self) -> Source:
        if self.config_sha256 not in (None, hashlib.sha256(self.config.encode(errors="replace")).hexdigest()):
            raise ValueError("source.config is not the text that was converted (its hash differs)")
        names = [file.source_name for file in self.files]
        if len({*names, _CONFIG}) != len(names) + 1:
            raise ValueError("source.files has a name twice, or config.json")
        return self


class Indexer(Strict):
    """What was added."""

    shard: FileName
    tensors: Annotated[list[Text], Entries]
    mtp_layers_without: Annotated[list[Text], Entries]


class FoldStep(Strict):
    """See `exporters/dsa/steps.py`; each kind has some of the fields."""

    kind: Literal["interleave", "pad", "times", "inverse-diagonal", "fill"]
    blocks: Size | None = None
    offset: Bytes | None = None
    rope: Size | None = None
    before: Bytes | None = None
    after: Bytes | None = None
    factor: float | None = None
    value: float | None = None
    only: Bytes | None = None
    diagonal: bool | None = None


class DerivedTensor(Strict):
    """See `exporters/dsa/steps.py`."""

    name: Text
    source: Text
    dtype: Text
    shape: Annotated[list[Bytes], Field(max_length=64)]
    steps: Annotated[list[FoldStep], Field(max_length=16)]
    replaces: bool


class Layout(Strict):
    """How the checkpoint is written. name: "deepseek_v32", "glm_moe_dsa" or "own"; why: the reason; family: the rule, if one was
    needed; query_form: how a query latent was made for a model without one; derived: tensors that a rule made, those with a
    factor in float32 so that nothing is rounded; dropped: the source's that are not in it (multi-token prediction)."""

    name: Text
    why: Text
    family: Text | None = None
    query_form: Text | None = None
    derived: Annotated[list[DerivedTensor], Entries]
    dropped: Annotated[list[Text], Entries]


class CheckpointManifest(Manifest):
    """See `exporters/dsa/checkpoint.py`."""

    source: Source
    indexer: Indexer
    layout: Layout | None = None
    report: dict[str, Any] | None = None
    verified: bool | None = None
    model: Text | None = None
    fingerprint: Sha256 | None = None


def is_converted(folder: Path) -> bool:
    """Whether `folder` has the manifest of a conversion."""
    return (folder / CHECKPOINT_MANIFEST).exists()


def read_checkpoint_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `convert` wrote. Raises UserError when there is none, or it is damaged."""
    if not is_converted(folder):
        raise UserError(
            f"{folder}: no {CHECKPOINT_MANIFEST}, so mla2dsa did not write it (a native DSA model has no dense original to "
            "restore)"
        )
    return read_manifest(folder / CHECKPOINT_MANIFEST, CheckpointManifest, _READ, _REMEDY)
