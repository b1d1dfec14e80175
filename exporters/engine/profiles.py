"""Which shapes an engine takes: two optimisation profiles, one for prefill and one for decode.

batch, seq and cache_length are the open dims of an export; each has a least, a usual (which TensorRT tunes for) and a
greatest size. "prefill" takes them as they are, "decode" takes one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UsageError
from ...files.sizes import FIRST_CAPACITY, PREFILL_CHUNK

DIMS = ("batch", "seq", "cache_length")
USUAL_LENGTH = 4096
Sizes = Mapping[str, int]


def read_sizes(flag: str, text: str | None) -> dict[str, int]:
    """batch=1,seq=512,cache_length=4096, or some of it. Raises UsageError."""
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else []:
        name, _, size = part.strip().partition("=")
        if name not in DIMS or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise UsageError(f"{flag} {text}: expected {'=N,'.join(DIMS)}=N, or some of these")
        sizes[name] = int(size)
    return sizes


def engine_profiles(limits: Mapping[str, int], least: Sizes, usual: Sizes, most: Sizes) -> list[dict[str, Any]]:
    """[{"name", "batch": [least, usual, most], "seq", "cache_length"}], as the engine's manifest holds them.

    limits: of the export. What is not given: as much as the export takes, in pieces of PREFILL_CHUNK tokens.
    Raises UsageError when sizes are out of order, or over the limits.
    """
    if unknown := sorted({*least, *usual, *most} - set(DIMS)):
        raise UsageError(f"{', '.join(unknown)}: no size of an engine; expected {', '.join(DIMS)}")
    bounds = {"batch": limits["max_batch"], "seq": limits["max_seq"], "cache_length": limits["max_seq"]}
    ranges = {
        "batch": (1, 1, limits["max_batch"]),
        "seq": (1, PREFILL_CHUNK, PREFILL_CHUNK),
        "cache_length": (FIRST_CAPACITY, USUAL_LENGTH, limits["max_seq"]),
    }
    found: dict[str, list[int]] = {}
    for dim in DIMS:
        low, middle, high = ranges[dim]
        top = most.get(dim, min(high, bounds[dim]))
        bottom = least.get(dim, min(low, top))
        found[dim] = [bottom, usual.get(dim, max(bottom, min(middle, top))), top]
        if found[dim] != sorted(found[dim]):
            raise UsageError(f"{dim}: {' <= '.join(map(str, found[dim]))} (--min, --opt, --max) are not in order")
        if top > bounds[dim]:
            raise UsageError(f"--max {dim}={top} is over the {bounds[dim]} of the export; export it with larger limits")
    if found["seq"][2] > found["cache_length"][2]:
        raise UsageError(f"--max seq={found['seq'][2]} is more than a cache of {found['cache_length'][2]} holds")
    return [{"name": "prefill", **found}, {"name": "decode", **found, "seq": [1, 1, 1]}]


def shape_of(entry: Mapping[str, Any], profile: Mapping[str, Any], which: int) -> tuple[int, ...]:
    """Shape of an input (as a manifest lists it) at the least (0), usual (1) or greatest (2) sizes of a profile."""
    return tuple(profile[dim][which] if isinstance(dim, str) else int(dim) for dim in entry["shape"])
