"""An exported ONNX model, with the plugin's fields attached, becomes a TensorRT engine.

model.onnx + fields --OnnxParser--> network --profiles, plugin--> plan --layer list--> every node a plugin layer, or no engine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ...compat.tensorrt_backend import Backend, OnProgress, load_plugins, plugin_error, set_architectures
from ...errors import UserError
from ...files.temporary import replace_file
from ...files.user_cache import cache_folder
from ...kernels.op_spec import NODES
from .engine_plan import EnginePlan
from .layers import Layer, check_plugin_layers, layers_from_inspector, layers_from_log
from .plugin_fields import PluginNode
from .profiles import shape_of


@dataclass(frozen=True)
class SerialisedEngine:
    """A serialised engine (anything with the buffer protocol) and its layers."""

    data: Any
    layers: tuple[Layer, ...]


def build_engine(
    backend: Backend,
    model: onnx.ModelProto,
    folder: Path,
    inputs: Sequence[Mapping[str, Any]],
    nodes: Sequence[PluginNode],
    plugin: Path,
    plan: EnginePlan,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> SerialisedEngine:
    """Build and check. folder: where the model's weights lie. inputs: as the export's manifest lists them. nodes: those that
    must be plugin layers. plugin: the library. plan: its profiles, architectures and embed_plugin are what counts here.

    Raises UserError, one line with the node and TensorRT's reason.
    """
    load_plugins(backend, plugin, NODES)
    log = backend.logger()
    builder = backend.trt.Builder(log)
    network = backend.network(builder)
    parser = _parse(backend, network, log, model, folder, plugin)
    config = _config(backend, builder, inputs, plugin, plan, on_progress)
    timings = _TimingCache(backend, config)
    data = builder.build_serialized_network(network, config)
    del parser  # it owns the weights, and has to live until here
    if data is None:
        raise UserError(f"{backend.name} cannot build the engine: {_reason(log, plugin)}")
    timings.save()
    layers = layers_from_log(log.layers) or _inspected(backend, log, data, plan.embed_plugin)
    check_plugin_layers(nodes, layers, len(plan.profiles))
    return SerialisedEngine(data, tuple(layers))


def _parse(backend: Backend, network: Any, log: Any, model: onnx.ModelProto, folder: Path, plugin: Path) -> Any:
    parser = backend.trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), str(folder / "model.onnx")):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        first = (
            f"{errors[0].node_name() or 'the model'}: {_one_line(errors[0].desc())}" if errors else _reason(log, plugin)
        )
        said = plugin_error(plugin)
        raise UserError(f"{backend.name} does not take the model: {first}" + (f" ({said})" if said else ""))
    return parser


def _config(
    backend: Backend,
    builder: Any,
    inputs: Sequence[Mapping[str, Any]],
    plugin: Path,
    plan: EnginePlan,
    on_progress: OnProgress,
) -> Any:
    trt, config = backend.trt, builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)  # caches are written in place
    config.progress_monitor = backend.monitor(on_progress)
    if plan.embed_plugin:
        config.plugins_to_serialize = [str(plugin)]
    set_architectures(backend, config, plan.sms)
    for limits in plan.profiles:
        profile = builder.create_optimization_profile()
        for entry in inputs:
            profile.set_shape(entry["name"], *(shape_of(entry, limits, which) for which in range(3)))
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"{backend.name} does not take profile {limits['name']} ({limits})")
    return config


def _inspected(backend: Backend, log: Any, data: Any, embedded: bool) -> list[Layer]:
    """Where the builder's log does not list them: by loading the engine, which needs a GPU. embedded: the plan has our library."""
    runtime = backend.trt.Runtime(log)
    if embedded:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        return []
    inspector = engine.create_engine_inspector()
    return layers_from_inspector(inspector.get_engine_information(backend.trt.LayerInformationFormat.JSON))


class _TimingCache:
    """How fast kernels were, from build to build of the same TensorRT; TensorRT itself refuses another GPU's. RTX times nothing."""

    def __init__(self, backend: Backend, config: Any) -> None:
        self._config = None if backend.is_rtx else config
        self._file = cache_folder() / "tensorrt" / f"timing-{backend.version}.cache"
        if self._config is None:
            return
        known = self._file.read_bytes() if self._file.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def save(self) -> None:
        if self._config is None:
            return
        with suppress(OSError):  # a cache that cannot be kept costs time, nothing else
            self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._file, memoryview(self._config.get_timing_cache().serialize()))


def _reason(log: Any, plugin: Path) -> str:
    said = plugin_error(plugin)
    errors = [_one_line(error) for error in log.errors]
    return said or (errors[0] if errors else "it gives no reason")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
