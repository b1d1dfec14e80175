"""What build and deploy print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...exporters.engine.trtexec import shown
from ...optimizer.build import Built
from .tables import print_table, table


def show_built(out: Path, built: Built) -> None:
    """The engine: where it came from, what is in it."""
    manifest = built.manifest
    backend, engine, layers = manifest["backend"], manifest["engine"], manifest["layers"]
    found = "hit" if built.cached else "damaged, built again:" if built.damaged else "miss"
    print(f"engine cache: {found} {built.key[:12]}")
    show_profiles(manifest["profiles"])
    architectures = ", ".join(f"sm_{sm}" for sm in manifest["sms"])
    print(f"{backend['name']} {backend['version']}, {manifest['dtype']}, {architectures}")
    for op, facts in manifest["ops"].items():
        print(f"{op}: {facts['nodes']} nodes, all plugin layers, {len(facts['programs'])} different programs")
    print(
        f"{out}: {engine['file']}, {engine['bytes'] / 1e6:.1f} MB, {layers['total']} layers, {layers['plugin']} of them plugins"
    )


def show_commands(out: Path, commands: Sequence[Sequence[str]]) -> None:
    """What to type on the machine with the GPU."""
    print(f"{out}: model.onnx with the plugin's fields, its weights and the plugin library; on the GPU machine:")
    for command in commands:
        print(shown(command))


def show_build_plan(planned: Mapping[str, Any]) -> None:
    """What would be built."""
    architectures = ", ".join(f"sm_{sm}" for sm in planned["sms"])
    print(f"{planned['backend']}, {planned['dtype']}, {architectures}")
    show_profiles(planned["profiles"])
    if "conversion" in planned:
        print("the checkpoint is dense: it would be converted first (`mla2dsa plan` shows how)")


def show_profiles(profiles: Sequence[Mapping[str, Any]]) -> None:
    """The sizes that an engine takes, one profile a row."""
    rows = table("profile (min / opt / max)", "batch", "seq", "cache length")
    for profile in profiles:
        rows.add_row(profile["name"], *(" / ".join(map(str, profile[dim])) for dim in ("batch", "seq", "cache_length")))
    print_table(rows)
