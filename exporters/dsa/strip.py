"""The way back: the dense checkpoint that a DSA checkpoint was made from, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files.digests import file_digest
from ...files.manifests.checkpoint_manifest import read_checkpoint_manifest
from ...files.model.model_files import CONFIG
from ...files.staging import staged_folder
from ...files.writing import place_file, write_new
from .names import MANIFEST
from .shards import restore_shard
from .steps import Derived, derived_of


def strip(dsa: Path, out: Path, overwrite: bool = False) -> Path:
    """The dense checkpoint that `dsa` was made from, bit for bit, every file under its old name; returns `out`.

    What was no part of the model is not in it (`not_restored`).
    Raises UserError when `dsa` was not written by mla2dsa, or a file to restore is missing or was changed since (sizes
    and hashes as in `file_digest`), UsageError when `out` is in the way.
    """
    manifest = read_checkpoint_manifest(dsa)
    source = manifest["source"]
    files, derived = source["files"], _exact(dsa, manifest)
    rewritten = [entry for entry in files if entry["placed"] == "rewritten"]
    for entry in files:
        if entry not in rewritten:
            _check_unchanged(dsa, entry)
    with staged_folder(out, [dsa], overwrite=overwrite) as folder:
        for entry in files:
            target = folder / entry["source_name"]
            if entry in rewritten:
                restore_shard(dsa, dsa / entry["name"], target, derived, entry["sha256"])
            else:
                place_file(dsa / entry["name"], target, link=True)
        write_new(folder / CONFIG, source["config"])
    return out


def not_restored(dsa: Path) -> list[str]:
    """Files and folders of the source that `strip` cannot give back, since they were no part of the model."""
    return list(read_checkpoint_manifest(dsa)["source"].get("left_out") or [])


def _exact(dsa: Path, manifest: Mapping[str, Any]) -> dict[str, Derived]:
    """What was made of the source's tensors and can be taken back, by their names."""
    try:
        made = [derived_of(entry) for entry in (manifest.get("layout") or {}).get("derived", ())]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{dsa / MANIFEST}: damaged, layout.derived ({error}); fetch it again, or convert again"
        ) from None
    return {it.source: it for it in made if it.replaces and it.is_exact}


def _check_unchanged(dsa: Path, entry: Mapping[str, Any]) -> None:
    file = dsa / entry["name"]
    if not file.exists():
        raise UserError(f"{file}: missing, but needed to restore {entry['source_name']}; fetch it again")
    found = file_digest(file)
    for field in ("size", "hashed", "sha256"):
        if found[field] != entry[field]:
            raise UserError(
                f"{file}: changed since the conversion ({field} {found[field]}, was {entry[field]}), so the dense "
                "checkpoint cannot be restored bit for bit; put the original file back"
            )
