"""How one engine is made: decided once, before any work, and taken as it is by every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EnginePlan:
    """profiles: as `engine_profiles` gives them. sms: GPU architectures, as 90. source: an exported folder, or where `exported`
    is false a DSA checkpoint, which is exported in `dtype` and up to `limits` first. out: the folder to write.

    embed_plugin: the engine contains the plugin library. keep: look into the cache of engines and fill it. jobs: processes
    that compile kernels.
    """

    profiles: Sequence[Mapping[str, Any]]
    sms: Sequence[int] = ()
    source: Path = Path()
    exported: bool = True
    out: Path = Path()
    backend: str = "tensorrt"
    dtype: str = "bfloat16"
    limits: Mapping[str, int] = field(default_factory=dict)
    embed_plugin: bool = False
    triton_repo: bool = False
    keep: bool = True
    overwrite: bool = False
    jobs: int = 1

    def to_json(self) -> dict[str, Any]:
        """What a person asks of it before building."""
        return {
            "backend": self.backend,
            "sms": list(self.sms),
            "dtype": self.dtype,
            "profiles": [dict(profile) for profile in self.profiles],
        }
