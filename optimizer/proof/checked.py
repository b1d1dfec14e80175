"""One thing that was held against a limit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was held against its limit. detail: where it failed, or what was looked at; remedy: if it fails."""

    name: str
    passed: bool
    value: float
    limit: float
    detail: str
    remedy: str
