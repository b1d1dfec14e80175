"""The catalogue of GPU kernels, built into a pack or listed. Results are plain data, as --json prints them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..kernels.gpu.binaries.manifest import Pack, kernel_name, read_pack, variant_fields
from ..kernels.gpu.binaries.pack import pack, variants_of
from ..kernels.gpu.programs.catalogue import FAMILIES, catalogue
from ..kernels.gpu.programs.program import Variant


def build(
    out: Path,
    sms: Sequence[int] | None = None,
    jobs: int | None = None,
    *,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Write the pack; sms and jobs default to all of FAMILIES and every CPU. Returns what it came to."""
    started = time.monotonic()
    made = pack(
        catalogue,
        FAMILIES if sms is None else sms,
        out,
        overwrite=overwrite,
        jobs=_cpus() if jobs is None else jobs,
        on_progress=lambda done, total: on_progress("compiling kernels", done, total),
    )
    rows = _rows(made)
    worst = max(rows, key=lambda row: int(row["spilled"]))
    return {
        "out": str(out),
        "sms": list(made.sms),
        "versions": dict(made.versions),
        "kernels": len(made.kernels),
        "binaries": len(rows),
        "programs": len(made.programs),
        "bytes": sum(row["bytes"] for row in rows),
        "most_spilled": {key: worst[key] for key in ("name", "sm", "spilled")},
        "seconds": round(time.monotonic() - started, 1),
    }


def list_pack(folder: Path) -> list[dict[str, Any]]:
    """One row a binary of the pack. Raises UserError if the pack is not whole."""
    return _rows(read_pack(folder))


def list_catalogue() -> list[dict[str, Any]]:
    """One row a kernel that would be built, with the architectures it would be built for."""
    sms: dict[Variant, list[int]] = {}
    for sm in FAMILIES:
        for variant in variants_of(catalogue(sm)):
            sms.setdefault(variant, []).append(sm)
    ordered = sorted(sms, key=lambda variant: (variant.kernel, sms[variant]))
    return [{"name": kernel_name(it), "sms": sms[it], **_described(it)} for it in ordered]


def _rows(made: Pack) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "sm": sm,
            **_described(kernel.variant),
            **{
                key: getattr(binary, key)
                for key in ("threads", "shared", "registers", "spilled", "bytes", "ptxas", "file")
            },
        }
        for name, kernel in made.kernels.items()
        for sm, binary in kernel.binaries.items()
    ]
    return sorted(rows, key=lambda row: (row["kernel"], [f"{it!s:>8}" for it in row["constants"].values()], row["sm"]))


def _described(variant: Variant) -> dict[str, Any]:
    fields = variant_fields(variant)
    return {key: fields[key] for key in ("kernel", "constants", "num_warps", "num_stages")}


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
