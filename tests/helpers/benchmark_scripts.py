"""Scripts of benchmarks/, imported by their path."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from places import ROOT


def script(name: str) -> ModuleType:
    """benchmarks/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
