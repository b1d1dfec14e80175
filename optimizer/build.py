"""build: a DSA checkpoint or an ONNX export becomes a folder with a TensorRT engine that needs no Python to run.

    checkpoint --export--> model.onnx --attach--> program and kernels in each DSA node --build_engine--> OUT

OUT holds model.engine, the plugin library, mla2dsa-engine.json (the manifest), layers.json (the engine's layers), plugins/
(the fields of each distinct plugin, as files), and the tokenizer and config files.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from .. import __version__
from ..compat.tensorrt_backend import RTX_SMS, Backend, check_sms, gpu_sm, open_backend
from ..errors import UsageError, UserError
from ..exporters.engine.cache import DAMAGED, ENGINE, HIT, LAYERS, MISS, engine_key, find_engine, keep_engine
from ..exporters.engine.plugin_build import build_plugin
from ..exporters.engine.plugin_fields import PluginNode, attach, fields_of
from ..exporters.engine.profiles import engine_profiles
from ..exporters.engine.to_tensorrt import Wish, build_engine
from ..exporters.engine.triton_repo import write_triton_repo
from ..exporters.engine.trtexec import build_command, time_command
from ..files.digests import file_sha256
from ..files.engine_manifest import ENGINE_MANIFEST, FORMAT
from ..files.export_manifest import EXPORT_MANIFEST, check_weight_files, is_export, read_export
from ..files.staging import check_target, place_file, staged_folder
from ..kernels.gpu.binaries.compile import ARCHITECTURES, check_architecture
from .export import DTYPES, export
from .model.checkpoint import Checkpoint

_DROPPED = ("kind", "file", "runs_on", "weights", "format")
PLUGINS_FOLDER, TRITON_FOLDER, ONNX_FILE = "plugins", "triton", "model.onnx"
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """sms: GPU architectures, None for those of `default_sms`. least, usual, most: sizes of batch, seq and cache_length.
    dtype: of the export, when a checkpoint is given. keep: use and fill the cache of engines. triton_repo: the server takes
    our plugin only from inside of the plan, so it implies embed_plugin."""

    backend: str = "tensorrt"
    sms: Sequence[int] | None = None
    least: Mapping[str, int] | None = None
    usual: Mapping[str, int] | None = None
    most: Mapping[str, int] | None = None
    dtype: str = "bfloat16"
    embed_plugin: bool = False
    triton_repo: bool = False
    keep: bool = True
    overwrite: bool = False
    jobs: int | None = None


@dataclass(frozen=True)
class Built:
    """manifest: of the engine folder. key: of the engine in the cache; cached: whether it came from there; damaged: whether
    what was kept there was no longer whole."""

    manifest: Mapping[str, Any]
    key: str
    cached: bool
    damaged: bool = False


def build(
    target: str | Path, out: Path, options: BuildOptions, on_progress: OnProgress = lambda stage, done, total: None
) -> Built:
    """Write `out`, whole or not at all. target: a DSA checkpoint (folder or hub id), or an ONNX export.

    Raises UsageError for values this does not take or an `out` in the way, UserError for what cannot be built.
    """
    sms = check_build(target, options)
    backend = open_backend(options.backend)
    options = replace(options, sms=sms, embed_plugin=options.embed_plugin or options.triton_repo)
    with _prepared(target, out, options, on_progress) as work:
        return _write(work, backend, out, options, on_progress)


def build_onnx(
    target: str | Path, out: Path, options: BuildOptions, on_progress: OnProgress = lambda stage, done, total: None
) -> list[list[str]]:
    """Write `out` with model.onnx, whose nodes carry the plugin's fields, its weights and the plugin library: all that trtexec
    needs on another machine, and no TensorRT here. Returns trtexec's command lines: build, then time each profile."""
    with _prepared(target, out, replace(options, sms=_architectures(options)), on_progress) as work:
        with staged_folder(work.folder, out, overwrite=options.overwrite) as staged:
            for file in work.folder.iterdir():
                if file.is_file() and file.name not in (EXPORT_MANIFEST, work.export["file"]):
                    place_file(file, staged / file.name, link=True)
            onnx.save(work.model, str(staged / ONNX_FILE))
            place_file(work.plugin, staged / work.plugin.name, link=False)
        library, inputs = work.plugin.name, work.export["inputs"]
        timing = [time_command(out, library, inputs, profile, at) for at, profile in enumerate(work.profiles)]
        return [build_command(out, library, inputs, work.profiles), *timing]


def check_build(target: str | Path, options: BuildOptions, convert_first: bool = False) -> tuple[int, ...]:
    """Raises what would fail only after an hour of converting and exporting: no TensorRT, no GPU to build for, no compiler,
    sizes that the model does not take. Returns the architectures. convert_first: `target` may be dense."""
    planned = plan_build(target, options, convert_first)
    open_backend(options.backend)
    build_plugin()
    return tuple(planned["sms"])


def plan_build(target: str | Path, options: BuildOptions, convert_first: bool = False) -> dict[str, Any]:
    """What `build` would do, without doing it: backend, architectures, profiles. convert_first: `target` may be dense."""
    found: dict[str, Any] = {"backend": options.backend, "sms": list(_architectures(options)), "dtype": options.dtype}
    folder = _onnx_folder(target)
    if folder is not None:
        manifest = read_export(folder, "onnx")
        found["dtype"] = manifest["dtype"]
        limits = manifest["limits"]
    else:
        checkpoint = Checkpoint.open(target) if convert_first else _dsa_checkpoint(target)
        context = int(checkpoint.config["max_position_embeddings"])
        limits = _export_limits(options, context)
    found["profiles"] = engine_profiles(limits, options.least or {}, options.usual or {}, options.most or {})
    return found


def default_sms(backend: str) -> tuple[int, ...]:
    """The GPU's own for TensorRT, which builds for the GPU it runs on; for TensorRT-RTX all that it and the kernels know.
    Raises UserError where there is no GPU to ask."""
    if backend == "tensorrt-rtx":
        return tuple(sm for sm in RTX_SMS if sm in ARCHITECTURES)
    sm = gpu_sm()
    if sm is None:
        raise UserError(
            "no GPU here to build for: name the one that is meant with --sm and --onnx-only, build on a machine that has it, or"
            " use --backend tensorrt-rtx"
        )
    return (sm,)


@dataclass(frozen=True)
class _Work:
    """What an engine is built from: an export, its model with the plugin's fields, the sizes it is to take, the library."""

    folder: Path  # of the export
    export: Mapping[str, Any]
    profiles: Sequence[Mapping[str, Any]]
    model: onnx.ModelProto
    nodes: Sequence[PluginNode]
    plugin: Path


def _architectures(options: BuildOptions) -> tuple[int, ...]:
    if options.dtype not in DTYPES:
        raise UsageError(f"dtype {options.dtype!r}: expected one of {', '.join(DTYPES)}")
    sms = default_sms(options.backend) if options.sms is None else tuple(sorted(set(options.sms)))
    if not sms:
        raise UsageError("--sm: expected at least one architecture, as 90")
    for sm in sms:
        check_architecture(sm)
    check_sms(options.backend, sms)
    return sms


def _dsa_checkpoint(target: str | Path) -> Checkpoint:
    checkpoint = Checkpoint.open(target)
    if not checkpoint.is_dsa():
        raise UserError(
            f"{target}: a dense checkpoint; run `mla2dsa convert` first, or `mla2dsa deploy`, which does all of it"
        )
    return checkpoint


def _export_limits(options: BuildOptions, context: int) -> dict[str, int]:
    most = options.most or {}
    return {"max_batch": most.get("batch", 1), "max_seq": most.get("cache_length", context)}


def _onnx_folder(target: str | Path) -> Path | None:
    """The export that `target` (its folder, or the .onnx file in it) names. Raises UserError for an .onnx file of another origin."""
    path = Path(target)
    if path.suffix == ".onnx":
        if not is_export(path.parent):
            raise UserError(
                f"{path}: no {EXPORT_MANIFEST} beside it, so it is no export of mla2dsa; run `mla2dsa export`"
            )
        return path.parent
    return path if is_export(path) else None


@contextmanager
def _prepared(target: str | Path, out: Path, options: BuildOptions, on_progress: OnProgress) -> Iterator[_Work]:
    """options: with the architectures named."""
    with _exported(target, out, options) as folder:
        check_target(folder, out, overwrite=options.overwrite)
        manifest = read_export(folder, "onnx")
        check_weight_files(folder, manifest)
        profiles = engine_profiles(manifest["limits"], options.least or {}, options.usual or {}, options.most or {})
        model = onnx.load(str(folder / manifest["file"]), load_external_data=False)
        jobs = options.jobs or os.cpu_count() or 1
        nodes = attach(
            model, options.sms or (), jobs, lambda done, total: on_progress("compiling kernels", done, total)
        )
        yield _Work(folder, manifest, profiles, model, nodes, build_plugin())


@contextmanager
def _exported(target: str | Path, out: Path, options: BuildOptions) -> Iterator[Path]:
    """The ONNX folder: `target` itself, or a temporary export beside `out` (hard links do not cross file systems)."""
    folder = _onnx_folder(target)
    if folder is not None:
        yield folder
        return
    checkpoint = _dsa_checkpoint(target)
    check_target(checkpoint.path, out, overwrite=options.overwrite)
    limits = _export_limits(options, int(checkpoint.config["max_position_embeddings"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.export-") as place:
        yield export(target, Path(place, "onnx"), "onnx", options.dtype, limits["max_batch"], limits["max_seq"]).folder


def _write(work: _Work, backend: Backend, out: Path, options: BuildOptions, on_progress: OnProgress) -> Built:
    key = _key(work, backend, options)
    with staged_folder(work.folder, out, overwrite=options.overwrite) as folder:
        found = find_engine(key, folder) if options.keep else MISS
        if found != HIT:
            _build_into(folder, work, backend, options, on_progress)
            if options.keep:
                keep_engine(key, folder)
        place_file(work.plugin, folder / work.plugin.name, link=False)
        _write_fields(work.model, folder / PLUGINS_FOLDER)
        for file in work.folder.iterdir():
            if (
                file.is_file()
                and file.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken")
                and _is_small(work, file)
            ):
                place_file(file, folder / file.name, link=False)
        manifest = _manifest(work, backend, options, folder)
        (folder / ENGINE_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if options.triton_repo:
            write_triton_repo(folder, manifest, folder / TRITON_FOLDER, out.name)
    return Built(manifest, key, found == HIT, found == DAMAGED)


def _is_small(work: _Work, file: Path) -> bool:
    """Whether it is a file about the model, rather than one of its weights, or of the ONNX export."""
    return file.name not in (EXPORT_MANIFEST, work.export["file"], *work.export["weights"]["linked_files"])


def _build_into(folder: Path, work: _Work, backend: Backend, options: BuildOptions, on_progress: OnProgress) -> None:
    wish = Wish(work.profiles, options.sms or (), options.embed_plugin)
    plan = build_engine(
        backend, work.model, work.folder, work.export["inputs"], work.nodes, work.plugin, wish, on_progress
    )
    with (folder / ENGINE).open("wb") as stream:
        stream.write(memoryview(plan.data))
    layers = [layer.to_json() for layer in plan.layers]
    (folder / LAYERS).write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")


def _key(work: _Work, backend: Backend, options: BuildOptions) -> str:
    facts = {
        "backend": [backend.name, backend.version],
        "sms": list(options.sms or ()),
        "profiles": list(work.profiles),
        "plugin": file_sha256(work.plugin),
        "embed": options.embed_plugin,
        "source": work.export["source"]["fingerprint"],
        "mla2dsa": __version__,
    }
    weights = [file for file in work.folder.iterdir() if file.name in work.export["weights"]["linked_files"]]
    weights += work.folder.glob("*.data")
    return engine_key(work.model.SerializeToString(deterministic=True), weights, facts)


def _write_fields(model: onnx.ModelProto, folder: Path) -> None:
    """What each distinct plugin is given, as two files, for a host that looks at plugins without TensorRT."""
    folder.mkdir()
    for name, (program, kernels) in fields_of(model).items():
        (folder / f"{name}.program").write_bytes(program)
        (folder / f"{name}.kernels").write_bytes(kernels)


def _manifest(work: _Work, backend: Backend, options: BuildOptions, folder: Path) -> dict[str, Any]:
    layers = json.loads((folder / LAYERS).read_text())
    plugin, engine = folder / work.plugin.name, folder / ENGINE
    plugins = sum(set(layer["onnx"]) <= {node.name for node in work.nodes} for layer in layers)
    return {
        "format": FORMAT,
        "backend": {"name": backend.name, "version": backend.version},
        "sms": list(options.sms or ()),
        "profiles": [dict(profile) for profile in work.profiles],
        "ops": _ops(work.nodes),
        "plugin": {"file": plugin.name, "sha256": file_sha256(plugin), "embedded": options.embed_plugin},
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
