"""The TensorRT plugin library, compiled into the wheel where there is a C++ compiler. All else is in pyproject.toml.

An editable install has none: mla2dsa compiles the library when it is first needed, and whenever its sources change.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def plugin_sources() -> Any:
    """exporters/engine/plugin_sources.py, which needs nothing but the standard library."""
    spec = importlib.util.spec_from_file_location("plugin_sources", ROOT / "exporters" / "engine" / "plugin_sources.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithPlugin(build_py):
    """Copies the package, and compiles the library into the copy."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The repository's root is the package, but this file is none of it."""
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("mla2dsa", "setup")]

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, "mla2dsa", "exporters", "tensorrt_plugin")
        reason = plugin_sources().compile_into(folder)
        if reason is not None:
            print(
                f"mla2dsa: the TensorRT plugin is not in this wheel ({reason}); it is compiled on first use",
                file=sys.stderr,
            )


class Platform(Distribution):
    """For this platform alone if the library is in it."""

    def has_ext_modules(self) -> bool:
        return plugin_sources().usable_compiler() is not None


class AnyPython(bdist_wheel):
    """The library does not touch Python's own, so one wheel serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildWithPlugin, "bdist_wheel": AnyPython}, distclass=Platform)
