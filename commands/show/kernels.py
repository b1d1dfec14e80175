"""What `mla2dsa kernels` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .tables import print_table, table


def show_build(built: Mapping[str, Any]) -> None:
    """Where the pack is, what is in it, and the kernel that spills most."""
    names = ", ".join(f"sm_{sm}" for sm in built["sms"])
    print(
        f"{built['out']}: {built['binaries']} binaries of {built['kernels']} kernels for {names}, {built['programs']} programs, "
        f"{built['bytes'] / 1e6:.1f} MB, in {built['seconds']:.0f} s (triton {built['versions']['triton']})"
    )
    worst = built["most_spilled"]
    spilled = (
        f"at most {worst['spilled']} bytes ({worst['name']} on sm_{worst['sm']})" if worst["spilled"] else "nothing"
    )
    print(f"spilled registers: {spilled}")


def show_kernels(kernels: Sequence[Mapping[str, Any]]) -> None:
    """A row a binary, or (of a catalogue that is not compiled) a row a kernel."""
    if kernels and "sm" not in kernels[0]:
        rows = table("kernel", "constants", "warps", "stages", "SMs")
        for it in kernels:
            sms = ", ".join(map(str, it["sms"]))
            rows.add_row(it["kernel"], _constants(it), str(it["num_warps"]), str(it["num_stages"]), sms)
    else:
        rows = table("kernel", "constants", "SM", "threads", "shared", "registers", "spilled", "bytes")
        for it in kernels:
            numbers = (it[key] for key in ("sm", "threads", "shared", "registers", "spilled", "bytes"))
            rows.add_row(it["kernel"], _constants(it), *map(str, numbers))
    rows.columns[1].justify = "left"
    print_table(rows)


def _constants(kernel: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in kernel["constants"].items())
