"""The layers of a finished engine, and the check that every op of ours is a plugin among them.

TensorRT falls back without a word (to a local function, to a plugin of the same name), so this is looked at each time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import UserError
from .plugin_fields import PluginNode

PLUGIN_TYPES = ("PluginV3", "custom_layer", "PluginV2", "Plugin")
_LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), (?P<rest>.*)$")
_ONNX = re.compile(r"\[ONNX Layer: (.*?)\]")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_FUSED = re.compile(r"_myl\d+_\d+$")  # what TensorRT's compiler appends to the name


@dataclass(frozen=True)
class Layer:
    """name: TensorRT's. onnx: names of the ONNX nodes it is made of. profile: the optimisation profile it belongs to."""

    name: str
    type: str
    onnx: tuple[str, ...]
    profile: int

    @property
    def is_plugin(self) -> bool:
        return self.type in PLUGIN_TYPES

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def layers_from_log(text: str) -> list[Layer]:
    """From the description that the builder logs at verbose level with ProfilingVerbosity.DETAILED; names of ONNX layers are
    told apart by a character (0x1e) that Python takes for the end of a line."""
    return [
        _layer(match["name"], match["type"], match["rest"]) for match in map(_LINE.match, text.split("\n")) if match
    ]


def layers_from_inspector(text: str) -> list[Layer]:
    """From IEngineInspector's JSON, of engines with ProfilingVerbosity.DETAILED. Raises UserError if it says no layer types."""
    found = json.loads(text).get("Layers", [])
    if not all(isinstance(entry, dict) and "LayerType" in entry for entry in found):
        raise UserError("the engine does not describe its layers: it was built without ProfilingVerbosity.DETAILED")
    return [_layer(entry["Name"], entry["LayerType"], str(entry.get("Metadata", ""))) for entry in found]


def check_plugin_layers(nodes: Sequence[PluginNode], layers: Sequence[Layer], profiles: int) -> None:
    """Every node is a plugin layer in each profile that the list tells apart. Raises UserError that names those that are not."""
    if not layers:
        raise UserError("TensorRT did not say which layers the engine has, so it cannot be checked; it is not written")
    told_apart = sorted({layer.profile for layer in layers})
    if len(told_apart) > profiles:
        raise UserError(f"the engine has layers of {len(told_apart)} profiles, expected {profiles}")
    for profile in told_apart:
        plugins = {name for layer in layers if layer.is_plugin and layer.profile == profile for name in layer.onnx}
        missing = [node.name for node in nodes if node.name not in plugins]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{missing[0]}{more} is no plugin layer in profile {profile} of the engine; it is not written"
            )


def _layer(name: str, kind: str, rest: str) -> Layer:
    profile = _PROFILE.search(name)
    plain = _FUSED.sub("", _PROFILE.sub("", name))
    named = tuple(_ONNX.findall(_PROFILE.sub("", rest)))
    return Layer(name, kind, named or (plain,), int(profile[1]) if profile else 0)
