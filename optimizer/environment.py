"""What this machine has: versions, devices, and what of mla2dsa is usable or why not."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "matplotlib",
    "starlette",
    "uvicorn",
)


_ALSO = {"onnxruntime": "onnxruntime-gpu"}  # another build of the same package: one of them is enough


def environment() -> dict[str, Any]:
    """Versions by package (None: not installed), devices, and per command and capability "usable" or the reason it is not."""
    from ..kernels import native_ops

    versions = {name: _version(name) for name in _PACKAGES}
    devices = _devices()
    return {
        "mla2dsa": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "packages": versions,
        "devices": devices,
        "commands": _commands(versions, devices),
        "usable": {
            "CPU kernels in C++": native_ops.summary(),
            "build engines with TensorRT-RTX (no GPU)": _needs(versions, "tensorrt-rtx", "triton"),
            "build and run engines with TensorRT": _engines(versions, devices),
            "TensorRT plugin library": _plugin(),
            "convert and verify with --device cuda": "usable" if devices else "no CUDA device that this torch can use",
        },
    }


def _commands(versions: dict[str, str | None], devices: list[str]) -> dict[str, str]:
    """What each command of the command line can do here."""
    model = _needs(versions, "torch", "transformers", "safetensors")
    onnx = _needs(versions, "torch", "transformers", "onnx", "onnxscript")
    engines = _engines(versions, devices)
    building = _either(
        _needs(versions, "tensorrt-rtx", "triton"), "with --backend tensorrt-rtx", engines, "with TensorRT"
    )
    asking = model if model != "usable" else f"usable in torch{_runtimes(versions, engines)}"
    serving = _needs(versions, "starlette", "uvicorn")
    return {
        **dict.fromkeys(("plan", "convert", "verify", "strip", "inspect", "compare"), model),
        "env": "usable", "completion": "usable", "recipe": "usable", "export": onnx, "report": _needs(versions, "matplotlib"),
        "generate": asking, "bench": asking, "serve": asking if serving == "usable" else serving,
        "build": building, "deploy": building,
        "kernels": _needs(versions, "triton"),
    }  # fmt: skip


def _either(one: str, how: str, other: str, how_else: str) -> str:
    """The states of two ways of doing something, in one."""
    usable = [text for state, text in ((one, how), (other, how_else)) if state == "usable"]
    return f"usable {' and '.join(usable)}" if usable else f"{how}: {one}; {how_else}: {other}"


def _runtimes(versions: dict[str, str | None], engines: str) -> str:
    onnx = " and onnxruntime" if versions["onnxruntime"] else ""
    return f"{onnx}{' and TensorRT' if engines == 'usable' else ''}"


def _engines(versions: dict[str, str | None], devices: list[str]) -> str:
    missing = _needs(versions, "tensorrt", "triton")
    return missing if missing != "usable" or devices else "no CUDA device that this torch can use"


def _plugin() -> str:
    from ..exporters.engine.plugin_sources import shipped, usable_compiler

    if shipped() is not None:
        return "usable, shipped with the package"
    compiler = usable_compiler()
    return (
        f"compiled on first use, with {compiler}" if compiler else "no C++ compiler on the PATH to compile it; set CXX"
    )


def _version(package: str) -> str | None:
    for name in (package, _ALSO.get(package)):
        try:
            if name is not None:
                return version(name) if name == package else f"{version(name)} ({name})"
        except PackageNotFoundError:
            continue
    return None


def _needs(versions: dict[str, str | None], *packages: str) -> str:
    missing = [name for name in packages if versions[name] is None]
    return "usable" if not missing else f"not installed: {', '.join(missing)}"


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        found.append(f"{props.name}, sm_{props.major}{props.minor}, {props.total_memory / 2**30:.0f} GiB")
    return found
