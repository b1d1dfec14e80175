"""What an engine was asked for becomes a plan: backend, architectures, sizes, what is built from what."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..compat.tensorrt_backend import BACKENDS, RTX_SMS, check_sms, gpu_sm, open_backend
from ..errors import UsageError, UserError, short
from ..exporters.engine.engine_plan import EnginePlan
from ..exporters.engine.plugin_build import build_plugin
from ..exporters.engine.profiles import engine_profiles
from ..files.dtypes import MODEL_DTYPES
from ..files.manifests.export_manifest import export_folder, read_export
from ..files.staging import check_target
from ..kernels.gpu.binaries.compile import ARCHITECTURES, check_architecture
from .model.cached_model import context_of
from .model.checkpoint import Checkpoint


@dataclass(frozen=True)
class BuildOptions:
    """sms: GPU architectures, None for those of `default_sms`. least, usual, most: sizes of batch, seq and cache_length.
    dtype: of the export, when a checkpoint is given. keep: use and fill the cache of engines. triton_repo: the server takes
    our plugin only from inside of the plan, so it implies embed_plugin. jobs: None for one a CPU."""

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


def plan_build(target: str | Path, out: Path, options: BuildOptions, convert_first: bool = False) -> EnginePlan:
    """target: a DSA checkpoint (folder or hub id), or an ONNX export. convert_first: a checkpoint that may be dense still.

    Raises UsageError for values this does not take or an `out` in the way, UserError for what cannot be built.
    """
    sms = _architectures(options)
    folder = export_folder(target)
    if folder is not None:
        manifest = read_export(folder, "onnx")
        source, dtype, limits = folder, str(manifest["dtype"]), manifest["limits"]
    else:
        checkpoint = Checkpoint.open(target) if convert_first else _dsa_checkpoint(target)
        source, dtype, limits = checkpoint.path, options.dtype, _export_limits(options, checkpoint)
    check_target(out, [source], overwrite=options.overwrite)
    return EnginePlan(
        profiles=engine_profiles(limits, options.least or {}, options.usual or {}, options.most or {}),
        sms=sms, source=source, exported=folder is not None, out=out, backend=options.backend, dtype=dtype, limits=limits,
        embed_plugin=options.embed_plugin or options.triton_repo, triton_repo=options.triton_repo, keep=options.keep,
        overwrite=options.overwrite, jobs=options.jobs or os.cpu_count() or 1,
    )  # fmt: skip


def check_ready(plan: EnginePlan) -> None:
    """Raises what would fail only after an hour of converting and exporting: no TensorRT, no compiler for the plugin."""
    open_backend(plan.backend)
    build_plugin()


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


def _architectures(options: BuildOptions) -> tuple[int, ...]:
    if options.dtype not in MODEL_DTYPES:
        raise UsageError(f"dtype {options.dtype!r}: expected one of {', '.join(MODEL_DTYPES)}")
    if options.backend not in BACKENDS:
        raise UsageError(f"backend {options.backend!r}: expected one of {', '.join(BACKENDS)}")
    sms = default_sms(options.backend) if options.sms is None else tuple(sorted(set(options.sms)))
    if not sms or any(type(sm) is not int for sm in sms):
        raise UsageError(f"--sm {short(repr(options.sms))}: expected at least one architecture, as 90")
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


def _export_limits(options: BuildOptions, checkpoint: Checkpoint) -> dict[str, int]:
    most = options.most or {}
    return {"max_batch": most.get("batch", 1), "max_seq": most.get("cache_length", context_of(checkpoint))}
