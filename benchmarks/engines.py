"""Building engines: seconds, bytes of the plan and layers, by number of layers of DeepSeek-V3's attention; no GPU needed.

    python benchmarks/engines.py                         4, 16 and 61 layers, kernels for sm_90, TensorRT-RTX
    python benchmarks/engines.py --layers 61 --sm 80,90

The layers are the DSA ops alone with cheap ops between (tests/helpers/stacks.py): what the plugins cost, without the weights. Kernels are
compiled before the clock runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from stacks import attention_stack

from mla2dsa.compat.tensorrt_backend import open_backend
from mla2dsa.exporters.engine.engine_plan import EnginePlan
from mla2dsa.exporters.engine.plugin_build import build_plugin
from mla2dsa.exporters.engine.plugin_fields import attach, fields_of
from mla2dsa.exporters.engine.profiles import engine_profiles
from mla2dsa.exporters.engine.to_tensorrt import build_engine

LIMITS = {"max_batch": 4, "max_seq": 131072}


def measure(layers: int, sms: tuple[int, ...], backend_name: str) -> dict[str, Any]:
    model, inputs = attention_stack(layers)
    nodes = attach(model, sms, 1)
    backend, plugin = open_backend(backend_name), build_plugin()
    started = time.perf_counter()
    plan = build_engine(
        backend,
        model,
        Path(),
        inputs,
        nodes,
        plugin,
        EnginePlan(engine_profiles(LIMITS, {}, {}, {}), ()),
        lambda *_: None,
    )
    seconds = time.perf_counter() - started
    size = memoryview(plan.data).nbytes
    fields = sum(len(program) + len(kernels) for program, kernels in fields_of(model).values())
    return {
        "layers": layers, "sms": list(sms), "backend": f"{backend.name} {backend.version}", "seconds": round(seconds, 1),
        "plan_mb": round(size / 1e6, 1), "mb_per_layer": round(size / 1e6 / layers, 2), "fields_of_a_layer_mb": round(fields / 1e6, 2),
        "engine_layers": len(plan.layers), "plugin_layers": sum(layer.is_plugin for layer in plan.layers),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,16,61")
    parser.add_argument("--sm", default="90")
    parser.add_argument("--backend", default="tensorrt-rtx")
    args = parser.parse_args()
    sms = tuple(int(part) for part in args.sm.split(","))
    for layers in args.layers.split(","):
        print(json.dumps(measure(int(layers), sms, args.backend)), flush=True)


if __name__ == "__main__":
    main()
