"""Compiled kernels kept between runs, by what they were made from: one file each in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ....files.temporary import replace_file
from ....files.user_cache import code_folder
from ..programs.program import Variant
from .compile import PTX_VERSION, Compiled, compile_variant, find_kernel
from .manifest import variant_fields
from .ptxas import installed
from .source import source_hash

_REVISION = 1  # of what `compile` does beyond its inputs


def compile_cached(variant: Variant, sm: int, functions: Mapping[str, Any] | None = None) -> Compiled:
    """As `compile_variant`, from the cache if it has been compiled before. A damaged entry is compiled again."""
    try:
        file = code_folder("kernels") / f"{cache_key(variant, sm, functions)}.bin"
    except OSError:  # a cache that cannot be written is no reason to fail
        return compile_variant(variant, sm, functions)
    found = _read(file)
    if found is None:
        found = compile_variant(variant, sm, functions)
        _write(file, found)
    return found


def cache_key(variant: Variant, sm: int, functions: Mapping[str, Any] | None = None) -> str:
    """Of everything the binary depends on. Raises UserError as `compile_variant` does for an unknown kernel."""
    import triton

    made_from = {
        "source": source_hash(find_kernel(variant, functions)),
        "variant": variant_fields(variant),
        "sm": sm,
        "triton": triton.__version__,
        "ptxas": [tool.name for tool in installed()],
        "ptx": PTX_VERSION,
        "revision": _REVISION,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> Compiled | None:
    """One line of JSON, then the cubin."""
    try:
        head, _, cubin = file.read_bytes().partition(b"\n")
        fields = json.loads(head)
        if fields.pop("sha256") != hashlib.sha256(cubin).hexdigest():
            return None
        fields["parameters"] = tuple((name, kind) for name, kind in fields["parameters"])
        return Compiled(cubin=cubin, **fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(file: Path, compiled: Compiled) -> None:
    """Whole or not at all; a cache that cannot be written is no reason to fail."""
    fields = asdict(compiled)
    cubin = fields.pop("cubin")
    head = json.dumps(fields | {"sha256": hashlib.sha256(cubin).hexdigest()}).encode()
    with suppress(OSError):
        replace_file(file, head + b"\n" + cubin)
