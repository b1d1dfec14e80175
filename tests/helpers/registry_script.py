"""Run as a process of its own by test_trt_registries.py: a TensorRT loads the plugin library and creates plugins as it does when it
loads an engine. Arguments: its Python module, the library, a folder of fields. Prints JSON."""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

RUNTIME_OF = {"tensorrt_lean_bindings": "tensorrt_lean_libs"}


def main(module: str, library: str, folder: str) -> None:
    if module in RUNTIME_OF:
        importlib.import_module(RUNTIME_OF[module])
    trt = importlib.import_module(module)
    registry = trt.get_plugin_registry()
    registry.load_library(library)
    ours = [it for it in registry.all_creators if it.plugin_namespace == "mla2dsa"]
    files = sorted(Path(folder).glob("*.program"))
    found = {"version": trt.__version__, "creators": sorted(it.name for it in ours)}
    last = ctypes.CDLL(library).mla2dsa_last_error
    last.restype = ctypes.c_char_p
    plugins, refused = [], []
    for file in files:
        program, kernels = file.read_bytes(), file.with_suffix(".kernels").read_bytes()
        plugins.append(described(trt, created(trt, registry, file.name, program, kernels)))
        for wrong in (
            program.replace(b"mla2dsa-plugin 1", b"mla2dsa-plugin 9"),
            program.replace(b"launch ", b"lunch ", 1),
        ):
            made = created(trt, registry, file.name, wrong, kernels)
            refused.append({"plugin": made is not None, "why": last().decode()})
    print(json.dumps({**found, "plugins": plugins, "refused": refused}))


def created(trt: Any, registry: Any, file: str, program: bytes, kernels: bytes) -> Any:
    creator = registry.get_creator(file.split("-")[0], "1", "mla2dsa")
    fields = [
        trt.PluginField(name, np.frombuffer(data, np.uint8), trt.PluginFieldType.CHAR)
        for name, data in (("program", program), ("kernels", kernels))
    ]
    try:
        return creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.RUNTIME)
    except Exception:  # bindings that raise where others give None
        return None


def described(trt: Any, plugin: Any) -> dict[str, Any]:
    """What TensorRT reads of a plugin, through each of its interfaces. (Its bindings cannot ask a plugin in C++ for its fields.)"""
    kinds = trt.PluginCapabilityType
    core, build, runtime = map(plugin.get_capability_interface, (kinds.CORE, kinds.BUILD, kinds.RUNTIME))
    return {
        "name": core.plugin_name,
        "version": core.plugin_version,
        "namespace": core.plugin_namespace,
        "outputs": build.num_outputs,
        "interfaces": [f"{it.interface_info.kind} {it.interface_info.major}" for it in (core, build, runtime)],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
