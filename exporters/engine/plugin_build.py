"""The plugin library: the one that came with the package, else compiled by the machine's own compiler on first use, and kept."""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError
from ...kernels.native_build import BuildError, build_library
from .plugin_sources import LIBRARIES, flags, shipped, sources


def build_plugin() -> Path:
    """libmla2dsa_trt.so. Raises UserError where it has to be compiled and there is no compiler."""
    library = shipped()
    if library is not None:
        return library
    try:
        return build_library("mla2dsa_trt", sources(), flags(), LIBRARIES)
    except BuildError as error:
        raise UserError(f"the TensorRT plugin cannot be compiled: {error}") from error
