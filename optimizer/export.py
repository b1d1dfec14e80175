"""export: a DSA checkpoint becomes a folder that runs elsewhere, an ONNX model or a torch `.pt2`.

    checkpoint -> capture of its dense base -> mla_to_dsa -> add_cache -> model.onnx (weights stay in the checkpoint's files)
                                                                       -> model.pt2  (weights inside)

Beside the model lies `mla2dsa-export.json`, the manifest, which is all a runtime needs to know:

    format          1, the version of this description
    kind, file      "onnx" and "model.onnx", or "pt2" and "model.pt2"
    digest          {"size", "hashed", "sha256"} of `file` (`files/digests.py`)
    dtype           "float32", "float16" or "bfloat16": of caches, logits and all maths outside the DSA ops
    runs_on         names of the runtimes that have kernels for that dtype: "onnxruntime-cpu", "tensorrt", "torch"
    logits          "last": [batch, 1, vocab] of the token at index `last`; "all": [batch, seq, vocab], no input `last`
    inputs, outputs [{"name", "dtype", "shape"}] in graph order; a shape holds numbers and "batch", "seq", "cache_length"
    caches          one per layer: {"layer", "latent": {"input", "output", "width"}, "index_key": {the same, or null where the
                    layer attends to what the last one before it with index keys selected}}; each cache is
                    [batch, cache_length, width], starts as zeros, and an output is the next call's input
    limits          {"max_batch", "max_seq"}: max_seq is the most slots a cache may have (and the model's context at most)
    model           {"model_type", "vocab_size", "num_hidden_layers", "context", "bos_token_id",
                    "eos_token_id": ids of all tokens that end a text, a list (`files/model/stop_tokens.py`)}
    indexer         {"index_topk", "index_n_heads", "index_head_dim", "rope_interleave"}
    source          {"name", "fingerprint", "files"}: the checkpoint's folder name and digests (`Checkpoint.source_hashes`)
    weights         {"linked_files", "zero_copy_bytes", "written_bytes", "written"}: written lists what had to be written:
                    {"name", "bytes", "reason"}
    versions        of mla2dsa, torch, transformers, onnx
    files           [{"name", "size"}]: every other file of the folder, which `--overwrite` may replace; see `files/ownership.py`

How to call it: input_ids, position_ids (rotary) and slots (where in the cache a token lives) are [batch, seq] int64. A
token sees the slots from key_begin[b] up to its own. Without padding slots == position_ids == 0, 1, 2...; a sequence padded
by n on the left has key_begin = n and position_ids = slots - n. On the right, repeat the last real token's id, position and
slot (equal rows), and point `last` at it. Prefill may come in chunks of any size: a decode step is a chunk of one token.
A `.pt2` takes the same as keyword inputs, `torch.export.load(file).module()(**inputs)`, once `mla2dsa.kernels.ops` is imported,
and returns (logits, {output name: cache}).
Work grows with cache_length, not with the tokens in the cache: start with a short cache and enlarge it (doubling, rows
appended, up to limits.max_seq) as the sequence grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..compat import torch_private
from ..errors import UsageError, short
from ..files.digests import file_digest
from ..files.dtypes import MODEL_DTYPES, torch_dtype
from ..files.manifests.export_manifest import EXPORT_MANIFEST, FORMAT
from ..files.model.model_files import CONFIG, model_files
from ..files.model.stop_tokens import stop_tokens
from ..files.ownership import refuse_names, write_manifest
from ..files.staging import claim, staged_folder
from ..files.writing import create, place_file
from ..passes.add_cache import Cached
from ..passes.graph.editor import ProgramEditor
from .model.cached_model import CachedModel, open_cached
from .model.checkpoint import Checkpoint

FORMATS = ("onnx", "pt2")
_RUNS_ON: dict[str, dict[str, tuple[str, ...]]] = {
    "onnx": {
        "float32": ("onnxruntime-cpu", "tensorrt"),
        "float16": ("onnxruntime-cpu", "tensorrt"),
        "bfloat16": ("tensorrt",),  # onnxruntime has no bfloat16 kernels on the CPU
    },
    "pt2": dict.fromkeys(MODEL_DTYPES, ("torch",)),
}
_OURS = {"model.onnx", "model.data", EXPORT_MANIFEST}


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, and its manifest."""

    folder: Path
    manifest: Mapping[str, Any]


def export(
    model: str | Path,
    out: Path,
    format: str = "onnx",
    dtype: str = "float32",
    max_batch: int = 1,
    max_seq: int | None = None,
    copy_weights: bool = False,
    last_only: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Write `model` (a DSA checkpoint: folder or hub id) to `out`, whole or not at all.

    max_seq: default the model's context. copy_weights: no hard links to the checkpoint's files, `out` holds all.
    Raises UsageError for values this does not take or an `out` in the way, UserError for a checkpoint it cannot export.
    """
    _check_usage(format, dtype, max_batch, max_seq)
    checkpoint = Checkpoint.open(model)
    with claim(out, [checkpoint.path], overwrite=overwrite):
        shards = {place.file.name for place in checkpoint.whole_tensors.values()}
        refuse_names(checkpoint.path, [] if format == "pt2" or copy_weights else shards, _OURS)
        ready = open_cached(checkpoint, torch_dtype(dtype), last_only)
        context = ready.captured.max_length
        if max_seq is not None and max_seq > context:
            raise UsageError(f"max_seq {max_seq}: the model's context is {context} tokens; pass at most that")
        limits = {"max_batch": max_batch, "max_seq": max_seq or context}
        with staged_folder(out) as folder:
            write = _write_onnx if format == "onnx" else _write_pt2
            written = write(ready, folder, copy_weights)
            for name in (CONFIG, *(it for it in model_files(checkpoint.path) if it not in shards)):
                place_file(checkpoint.path / name, folder / name, link=False)
            manifest = write_manifest(folder, EXPORT_MANIFEST, _manifest(ready, format, dtype, limits, written, folder))
    return Exported(out, manifest)


def _check_usage(format: str, dtype: str, max_batch: int, max_seq: int | None) -> None:
    if format not in FORMATS:
        raise UsageError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if dtype not in MODEL_DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(MODEL_DTYPES)}")
    if max_batch < 1:
        raise UsageError(f"max_batch {max_batch}: expected at least 1")
    if max_seq is not None and max_seq < 1:
        raise UsageError(f"max_seq {max_seq}: expected at least 1")


def _write_onnx(ready: CachedModel, folder: Path, copy_weights: bool) -> Mapping[str, Any]:
    from ..exporters.onnx_model.to_onnx import export_onnx
    from .model.stored import stored_weights

    cached = ready.cached
    layers = {cache.layer: cache.index_key is not None for cache in cached.caches}
    weights = stored_weights(ready.source, cached.program)
    placed = export_onnx(cached.program, layers, output_names(cached), weights, folder, copy_weights=copy_weights)
    return placed.summary()


def _write_pt2(ready: CachedModel, folder: Path, copy_weights: bool) -> Mapping[str, Any]:
    """The cached program with its weights, in one file: what torch.export.load gives back runs as it is."""
    editor = ProgramEditor(ready.cached.program)
    editor.drop_input("use_cache")  # transformers' switch, always off in a capture: callers need not know it
    program = editor.finish()
    signature = program.module_call_graph[0].signature
    assert signature is not None
    presents = output_names(ready.cached)[1:]
    signature.out_spec = torch_private.structure((0, dict.fromkeys(presents, 0)))  # was a class of transformers
    load = ready.source.loader(program)
    for name, declared in list(program.state_dict.items()):
        value = load(name)
        program.state_dict[name] = (
            torch.nn.Parameter(value, requires_grad=False) if isinstance(declared, torch.nn.Parameter) else value
        )
    with create(folder / "model.pt2") as stream:
        torch.export.save(program, stream)
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    return {"linked_files": [], "zero_copy_bytes": 0, "written_bytes": size, "written": []}


def _manifest(
    ready: CachedModel, format: str, dtype: str, limits: Mapping[str, int], written: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    cached, checkpoint = ready.cached, ready.checkpoint
    config = checkpoint.config
    fields = ("model_type", "vocab_size", "num_hidden_layers", "bos_token_id")
    inputs, outputs = interface(cached, int(config["vocab_size"]), dtype)
    return {
        "format": FORMAT, "kind": format, "file": f"model.{format}", "digest": file_digest(folder / f"model.{format}"), "dtype": dtype,
        "runs_on": list(_RUNS_ON[format][dtype]), "logits": "last" if cached.last_only else "all",
        "inputs": inputs, "outputs": outputs,
        "caches": [
            {"layer": c.layer, "latent": _cache(c.latent, c.latent_width),
             "index_key": _cache(c.index_key, c.index_key_width) if c.index_key and c.index_key_width else None}
            for c in cached.caches
        ],
        "limits": dict(limits),
        "model": {**{f: config.get(f) for f in fields}, "context": ready.captured.max_length,
                  "eos_token_id": stop_tokens(checkpoint.path)},
        "indexer": {name: size for name, size in asdict(ready.indexer).items() if name != "shared"},  # `caches` says it
        "source": {"name": short(checkpoint.path.name, 255), "fingerprint": checkpoint.fingerprint(), "files": checkpoint.source_hashes()},
        "weights": dict(written), "versions": _versions(),
    }  # fmt: skip


def _cache(name: str, width: int) -> dict[str, Any]:
    return {"input": f"past_{name}", "output": f"present_{name}", "width": width}


def interface(cached: Cached, vocab_size: int, dtype: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs of the cached program in graph order, as the manifest lists them."""
    widths = {name: width for cache in cached.caches for name, width in cache.widths.items()}
    tokens: dict[str, Any] = {"dtype": "int64", "shape": ["batch", "seq"]}
    rows: dict[str, Any] = {"dtype": "int64", "shape": ["batch"]}

    def entry(name: str, cache: str) -> dict[str, Any]:
        if cache in widths:
            return {"name": name, "dtype": dtype, "shape": ["batch", "cache_length", widths[cache]]}
        return {"name": name, **(rows if name in ("key_begin", "last") else tokens)}

    signature = cached.program.graph_signature
    inputs = [entry(name, name.removeprefix("past_")) for name in signature.user_inputs if isinstance(name, str)]
    length: int | str = 1 if cached.last_only else "seq"
    outputs = [{"name": "logits", "dtype": dtype, "shape": ["batch", length, vocab_size]}]
    outputs += [entry(name, name.removeprefix("present_")) for name in output_names(cached)[1:]]
    return inputs, outputs


def output_names(cached: Cached) -> list[str]:
    """Names of the cached program's outputs, in order."""
    return ["logits", *(f"present_{name}" for cache in cached.caches for name in cache.widths)]


def _versions() -> dict[str, str]:
    found = {"mla2dsa": __version__}
    for package in ("torch", "transformers", "onnx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
