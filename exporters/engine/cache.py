"""Engines that have been built, by everything that they were made from: what is the same is not built again.

A folder of the user cache per engine, named by a hash; it may be removed at any time, and several runs may use it at once:
an entry appears whole, is never changed, and what was taken from it is checked after it was taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files.digests import file_sha256
from ...files.json_files import read_json
from ...files.system_calls import move_folder
from ...files.temporary import cache_entry
from ...files.user_cache import code_folder
from ...files.writing import place_file, write_json

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
    with cache_entry(kept.parent) as place:
        if _is_whole(kept, place):
            for name in (ENGINE, LAYERS):
                place_file(place / name, folder / name, link=True)
            return HIT
        with suppress(FileNotFoundError):
            move_folder(kept, place / "damaged")
    return DAMAGED


def _is_whole(kept: Path, place: Path) -> bool:
    """Take what is kept to `place`, and see whether it is what it was."""
    try:
        known = read_json(kept / DIGEST)
        for name in (ENGINE, LAYERS):
            place_file(kept / name, place / name, link=True)
        return all(file_sha256(place / name) == known[name] for name in (ENGINE, LAYERS))
    except (FileNotFoundError, KeyError, UserError):
        return False


def keep_engine(key: str, folder: Path) -> None:
    """Keep the engine and the layers that lie in `folder`, unless another run was first."""
    kept = _place(key)
    with cache_entry(kept.parent) as place:
        made = place / "engine"
        for name in (ENGINE, LAYERS):
            place_file(folder / name, made / name, link=True)
        write_json(made / DIGEST, {name: file_sha256(made / name) for name in (ENGINE, LAYERS)})
        with suppress(FileExistsError):
            move_folder(made, kept)


def _place(key: str) -> Path:
    return code_folder("engines") / key
