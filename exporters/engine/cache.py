"""Engines that have been built, by everything that they were made from: what is the same is not built again.

A folder of the user cache per engine, named by a hash; it may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...files.digests import file_sha256
from ...files.staging import place_file
from ...files.user_cache import cache_folder

ENGINE, LAYERS, DIGEST = "model.engine", "layers.json", "digest.json"
HIT, MISS, DAMAGED = "hit", "miss", "damaged"


def engine_key(model: bytes, weights: Iterable[Path], facts: Mapping[str, Any]) -> str:
    """model: the ONNX bytes with the plugin's fields. weights: files that the model points into, which count by name, size and
    time of change, so that no two can be taken for one another. facts: profiles, versions, architectures, hashes."""
    digest = hashlib.sha256(model)
    for file in sorted(weights):
        status = file.stat()
        digest.update(f"\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def find_engine(key: str, folder: Path) -> str:
    """Put a kept engine and its layers into `folder`: HIT. MISS if there is none, DAMAGED (and removed) if it is not what was kept."""
    kept = _place(key)
    if not (kept / DIGEST).is_file():
        return MISS
    try:
        known = json.loads((kept / DIGEST).read_text())
        whole = all(file_sha256(kept / name) == known[name] for name in (ENGINE, LAYERS))
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        shutil.rmtree(kept, ignore_errors=True)
        return DAMAGED
    for name in (ENGINE, LAYERS):
        place_file(kept / name, folder / name, link=True)
    return HIT


def keep_engine(key: str, folder: Path) -> None:
    """Keep the engine and the layers that lie in `folder`."""
    kept = _place(key)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=kept.parent, prefix=".partial-"))
    try:
        for name in (ENGINE, LAYERS):
            place_file(folder / name, partial / name, link=True)
        (partial / DIGEST).write_text(json.dumps({name: file_sha256(partial / name) for name in (ENGINE, LAYERS)}))
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(partial, kept)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _place(key: str) -> Path:
    return cache_folder() / "engines" / key
