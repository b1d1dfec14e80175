"""build: a DSA checkpoint or an ONNX export becomes a folder with a TensorRT engine that needs no Python to run.

    checkpoint --export--> model.onnx --attach--> program and kernels in each DSA node --build_engine--> OUT

OUT holds model.engine, the plugin library, mla2dsa-engine.json (the manifest), layers.json (the engine's layers), plugins/
(the fields of each distinct plugin, as files), and the tokenizer and config files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from .. import __version__
from ..compat.tensorrt_backend import Backend, open_backend
from ..exporters.engine.cache import DAMAGED, ENGINE, HIT, LAYERS, MISS, engine_key, find_engine, keep_engine
from ..exporters.engine.engine_plan import EnginePlan
from ..exporters.engine.plugin_build import build_plugin
from ..exporters.engine.plugin_fields import PluginNode, attach, fields_of
from ..exporters.engine.plugin_sources import LIBRARY
from ..exporters.engine.to_tensorrt import build_engine
from ..exporters.engine.triton_repo import write_triton_repo
from ..exporters.engine.trtexec import build_command, time_command
from ..exporters.onnx_model.external_data import DATA_FILE
from ..files.digests import file_sha256
from ..files.manifests.engine_manifest import ENGINE_MANIFEST, FORMAT
from ..files.manifests.export_manifest import EXPORT_MANIFEST, check_weight_files, read_export, read_onnx_export
from ..files.model.model_files import CONFIG, model_files
from ..files.onnx_file import check_external_files, parse_onnx
from ..files.ownership import FILES_MANIFEST, refuse_names, write_manifest
from ..files.staging import Claim, beside, claim, staged_folder
from ..files.writing import place_file, write_new
from .build_plan import check_ready
from .export import export

_DROPPED = ("kind", "file", "digest", "runs_on", "weights", "format", "files")
PLUGINS_FOLDER, TRITON_FOLDER, ONNX_FILE = "plugins", "triton", "model.onnx"
_OURS = (ENGINE, LAYERS, ENGINE_MANIFEST, FILES_MANIFEST, LIBRARY, ONNX_FILE, PLUGINS_FOLDER, TRITON_FOLDER)
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """manifest: of the engine folder. key: of the engine in the cache; cached: whether it came from there; damaged: whether
    what was kept there was no longer whole."""

    manifest: Mapping[str, Any]
    key: str
    cached: bool
    damaged: bool = False


def build(plan: EnginePlan, on_progress: OnProgress = lambda stage, done, total: None) -> Built:
    """Write `plan.out`, whole or not at all. Raises UserError for what cannot be built."""
    check_ready(plan)
    backend = open_backend(plan.backend)
    with _prepared(plan, on_progress) as work:
        return _write(work, backend, on_progress)


def build_onnx(plan: EnginePlan, on_progress: OnProgress = lambda stage, done, total: None) -> list[list[str]]:
    """Write `plan.out` with model.onnx, whose nodes carry the plugin's fields, its weights and the plugin library: all that
    trtexec needs on another machine, and no TensorRT here. Returns trtexec's command lines: build, then time each profile."""
    out = plan.out
    with _prepared(plan, on_progress) as work:
        with staged_folder(out) as staged:
            for name in _carried(work.folder, work.export):
                place_file(work.folder / name, staged / name, link=True)
            write_new(staged / ONNX_FILE, work.model.SerializeToString())
            place_file(work.plugin, staged / work.plugin.name, link=False)
            write_manifest(staged, FILES_MANIFEST, {"format": FORMAT})
        library, inputs = work.plugin.name, work.export["inputs"]
        timing = [time_command(out, library, inputs, profile, at) for at, profile in enumerate(plan.profiles)]
        return [build_command(out, library, inputs, plan.profiles), *timing]


@dataclass(frozen=True)
class _Work:
    """What an engine is built from: the plan, an export, its model with the plugin's fields, the library."""

    plan: EnginePlan
    folder: Path  # of the export
    export: Mapping[str, Any]
    model: onnx.ModelProto
    nodes: Sequence[PluginNode]
    plugin: Path


@contextmanager
def _prepared(plan: EnginePlan, on_progress: OnProgress) -> Iterator[_Work]:
    with claim(plan.out, [plan.source], overwrite=plan.overwrite) as mine, _exported(plan, mine) as folder:
        manifest = read_export(folder, "onnx")
        check_weight_files(folder, manifest)
        beside_it = sorted(it.name for it in folder.iterdir() if it.name not in (EXPORT_MANIFEST, manifest["file"]))
        refuse_names(folder, beside_it, _OURS)
        file = folder / manifest["file"]
        model = parse_onnx(file, read_onnx_export(folder, manifest))
        check_external_files(file, model)
        nodes = attach(model, plan.sms, plan.jobs, lambda done, total: on_progress("compiling kernels", done, total))
        yield _Work(plan, folder, manifest, model, nodes, build_plugin())


@contextmanager
def _exported(plan: EnginePlan, mine: Claim) -> Iterator[Path]:
    """The ONNX folder: the plan's source, or a temporary export beside `out` (hard links do not cross file systems)."""
    if plan.exported:
        yield plan.source
        return
    with beside(mine) as place:
        limits = plan.limits
        yield export(plan.source, place / "onnx", "onnx", plan.dtype, limits["max_batch"], limits["max_seq"]).folder


def _write(work: _Work, backend: Backend, on_progress: OnProgress) -> Built:
    plan, key = work.plan, _key(work, backend)
    with staged_folder(plan.out) as folder:
        found = find_engine(key, folder) if plan.keep else MISS
        if found != HIT:
            _build_into(folder, work, backend, on_progress)
            if plan.keep:
                keep_engine(key, folder)
        place_file(work.plugin, folder / work.plugin.name, link=False)
        _write_fields(work.model, folder / PLUGINS_FOLDER)
        for name in (CONFIG, *model_files(work.folder)):
            place_file(work.folder / name, folder / name, link=False)
        manifest = _manifest(work, backend, folder)
        if plan.triton_repo:
            write_triton_repo(folder, manifest, folder / TRITON_FOLDER, plan.out.name)
        manifest = write_manifest(folder, ENGINE_MANIFEST, manifest)
    return Built(manifest, key, found == HIT, found == DAMAGED)


def _carried(folder: Path, export: Mapping[str, Any]) -> list[str]:
    """Files of an export that belong to the model: what its graph points into, config.json, the tokenizer's."""
    return [*_weight_files(folder, export), CONFIG, *model_files(folder)]


def _weight_files(folder: Path, export: Mapping[str, Any]) -> list[str]:
    return [*export["weights"]["linked_files"], *([DATA_FILE] if (folder / DATA_FILE).is_file() else [])]


def _build_into(folder: Path, work: _Work, backend: Backend, on_progress: OnProgress) -> None:
    engine = build_engine(
        backend, work.model, work.folder, work.export["inputs"], work.nodes, work.plugin, work.plan, on_progress
    )
    write_new(folder / ENGINE, memoryview(engine.data))
    layers = [layer.to_json() for layer in engine.layers]
    write_new(folder / LAYERS, json.dumps(layers, indent=1) + "\n")


def _key(work: _Work, backend: Backend) -> str:
    facts = {
        "backend": [backend.name, backend.version],
        "sms": list(work.plan.sms),
        "profiles": list(work.plan.profiles),
        "plugin": file_sha256(work.plugin),
        "embed": work.plan.embed_plugin,
        "source": work.export["source"]["fingerprint"],
        "mla2dsa": __version__,
    }
    weights = [work.folder / name for name in _weight_files(work.folder, work.export)]
    return engine_key(work.model.SerializeToString(deterministic=True), weights, facts)


def _write_fields(model: onnx.ModelProto, folder: Path) -> None:
    """What each distinct plugin is given, as two files, for a host that looks at plugins without TensorRT."""
    folder.mkdir()
    for name, (program, kernels) in fields_of(model).items():
        write_new(folder / f"{name}.program", program)
        write_new(folder / f"{name}.kernels", kernels)


def _manifest(work: _Work, backend: Backend, folder: Path) -> dict[str, Any]:
    layers = json.loads((folder / LAYERS).read_text())
    plugin, engine = folder / work.plugin.name, folder / ENGINE
    plugins = sum(set(layer["onnx"]) <= {node.name for node in work.nodes} for layer in layers)
    return {
        "format": FORMAT,
        "backend": {"name": backend.name, "version": backend.version},
        "sms": list(work.plan.sms),
        "profiles": [dict(profile) for profile in work.plan.profiles],
        "ops": _ops(work.nodes),
        "plugin": {"file": plugin.name, "sha256": file_sha256(plugin), "embedded": work.plan.embed_plugin},
        "engine": {"file": ENGINE, "bytes": engine.stat().st_size, "sha256": file_sha256(engine)},
        "layers": {"total": len(layers), "plugin": plugins},
        **{name: value for name, value in work.export.items() if name not in _DROPPED},
    }


def _ops(nodes: Sequence[PluginNode]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in sorted({node.op for node in nodes}):
        mine = [node for node in nodes if node.op == name]
        found[name] = {
            "nodes": len(mine),
            "programs": sorted({node.program_sha256 for node in mine}),
            "kernels": sorted({node.kernels_sha256 for node in mine}),
        }
    return found
