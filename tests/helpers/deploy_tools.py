"""examples/deploy/check_folder, compiled, with a driver that runs nothing."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import NATIVE, ROOT

from mla2dsa.exporters.engine.plugin_build import build_plugin
from mla2dsa.kernels.native_build import BuildError, compiler

PLUGIN = ROOT / "exporters" / "tensorrt_plugin"


@dataclass(frozen=True)
class Tools:
    """What was compiled: the checker, the driver without a GPU, the plugin library."""

    checker: Path
    driver: Path
    plugin: Path


def compiled_tools(place: Path) -> Tools:
    """In the folder `place`; skips where there is no compiler."""
    try:
        program = compiler()
    except BuildError as error:
        pytest.skip(str(error))
    flags = (program, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror")
    checker, driver = place / "check_folder", place / "libcuda_mock.so"
    source = ROOT / "examples" / "deploy" / "check_folder.cpp"
    _compile(*flags, str(source), "-I", str(PLUGIN), "-o", str(checker), "-ldl")
    _compile(*flags, "-shared", "-fPIC", str(NATIVE / "mock_driver.cpp"), "-o", str(driver))
    return Tools(checker, driver, build_plugin())


def check(tools: Tools, *words: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the checker with nothing of this process' environment: no Python on any path."""
    environment = {"MLA2DSA_LIBCUDA": str(tools.driver), "PATH": "/nowhere", **settings}
    command = [str(tools.checker), *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=environment, cwd=tools.checker.parent
    )


def _compile(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
