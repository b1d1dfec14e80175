"""The command lines with which NVIDIA's trtexec builds and times an engine, from a model whose nodes carry the plugin's fields."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .profiles import shape_of

_SHAPES = ("--minShapes", "--optShapes", "--maxShapes")


def build_command(
    folder: Path, plugin: str, inputs: Sequence[Mapping[str, Any]], profiles: Sequence[Mapping[str, Any]]
) -> list[str]:
    """For model.onnx and the plugin library in `folder`; one optimisation profile after the other."""
    command = [
        "trtexec",
        f"--onnx={folder / 'model.onnx'}",
        f"--dynamicPlugins={folder / plugin}",
        "--stronglyTyped",
        "--preview=+aliasedPluginIO1003",
        "--profilingVerbosity=detailed",
        f"--saveEngine={folder / 'model.engine'}",
        "--skipInference",
    ]
    for number, profile in enumerate(profiles):
        command.append(f"--profile={number}")
        command += [f"{flag}={_shapes(inputs, profile, which)}" for which, flag in enumerate(_SHAPES)]
    return command


def time_command(
    folder: Path, plugin: str, inputs: Sequence[Mapping[str, Any]], profile: Mapping[str, Any], number: int
) -> list[str]:
    """Times the engine at the usual shapes of a profile; the inputs are random, so the selection is too."""
    return [
        "trtexec",
        f"--loadEngine={folder / 'model.engine'}",
        f"--dynamicPlugins={folder / plugin}",
        f"--useProfile={number}",
        f"--shapes={_shapes(inputs, profile, 1)}",
        "--useCudaGraph",
    ]


def shown(command: Sequence[str]) -> str:
    """As it is typed into a shell, an option a line."""
    return " \\\n  ".join(shlex.quote(word) for word in command)


def _shapes(inputs: Sequence[Mapping[str, Any]], profile: Mapping[str, Any], which: int) -> str:
    return ",".join(f"{entry['name']}:{'x'.join(map(str, shape_of(entry, profile, which)))}" for entry in inputs)
