"""The plugin library, compiled by the machine's own compiler on first use."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..kernels.native_build import BuildError, build_library

_FOLDER = Path(__file__).parent / "tensorrt_plugin"
_FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")


def build_plugin() -> Path:
    """libmla2dsa_trt.so. Raises UserError where there is no compiler."""
    script = _FOLDER / "exports.map"
    sources = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h"), script])
    try:
        return build_library("mla2dsa_trt", sources, (*_FLAGS, f"-Wl,--version-script={script}"), ("-ldl",))
    except BuildError as error:
        raise UserError(f"the TensorRT plugin cannot be compiled: {error}") from error
