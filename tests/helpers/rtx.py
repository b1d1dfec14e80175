"""TensorRT-RTX for tests: always loaded through our backend, which has to come first in a process."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from mla2dsa.compat import tensorrt_backend
from mla2dsa.compat.tensorrt_backend import open_backend


def tensorrt_rtx() -> Any:
    """The module; skips the tests of the calling module where it is not installed."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is for x86-64 Linux", allow_module_level=True)
    return open_backend("tensorrt-rtx").trt


def unload_plugins() -> None:
    """Take back what `load_plugins` did in this process. No network or engine with these plugins may be alive."""
    backend = open_backend("tensorrt-rtx")
    handle = tensorrt_backend._LIBRARIES.pop(backend.name, None)
    if handle is not None:
        backend.trt.get_plugin_registry().deregister_library(handle)
