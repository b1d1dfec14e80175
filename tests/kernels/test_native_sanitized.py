"""The C++ on vectors reads and writes nothing that is not its own, and its threads share nothing: the sanitizers say so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from plugin_harness import has_sanitizers

from mla2dsa.kernels import native_ops
from mla2dsa.kernels.native_build import build_library

pytestmark = pytest.mark.skipif(not has_sanitizers(), reason="the compiler has no sanitizers")
DRIVER = Path(__file__).parent / "native" / "any_shape.cpp"
NATIVE = Path(native_ops.__file__).parent / "native"


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_any_shape(sanitizer: str) -> None:
    """On the best path on vectors that this processor has."""
    ways = [path for name, path in native_ops.PATHS.items() if name != "amx" and native_ops.library(name) is not None]
    if not ways:
        pytest.skip(native_ops.status("portable"))
    sources = [NATIVE / file for file in ways[0].sources]
    flags = [flag for flag in native_ops._FLAGS if flag not in ("-O3", "-shared", "-fPIC")]
    wanted = ("-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    program = build_library("mla2dsa_test_any_shape", [DRIVER, *sources], (*flags, *ways[0].flags, *wanted))
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "abort_on_error=1"}
    done = subprocess.run([program, "40"], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "fine\n"
