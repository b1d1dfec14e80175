"""The DSA checkpoint on disk: the dense one as it is, plus one shard of indexers; and the way back.

    dense/                                    dsa/
      config.json                               config.json                     deepseek_v32, index_topk ...
      model-00001-of-00002.safetensors   ==     model-00001-of-00002.safetensors  (hard link)
      model-00002-of-00002.safetensors   ==     model-00002-of-00002.safetensors  (hard link)
                                                model-indexer.safetensors       5 tensors a layer
      model.safetensors.index.json       ->     model.safetensors.index.json    all tensors
                                                mla2dsa.source-index.json       the dense index, for `strip`
      tokenizer.json ...                 ->     tokenizer.json ...              (copy)
                                                mla2dsa.json                    manifest

Weights are hard-linked: never write into them. The other files are copies, since people do edit those in place. What is no
part of the model (its card, scripts, images) stays behind (`files/model/model_files.py`): it speaks of the dense one.
config.json gets its name after the proof: a folder that a killed run leaves is no checkpoint to anybody. The manifest is
the last file, and lists all others.
A source with a single `model.safetensors` has it linked as `model-dense.safetensors`: transformers would load a file of
the first name alone and never look at the index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...errors import UserError
from ...files.digests import file_digest
from ...files.dtypes import MODEL_DTYPES, element_type, torch_dtype
from ...files.json_files import read_json
from ...files.manifests.checkpoint_manifest import FORMAT, read_checkpoint_manifest
from ...files.model.model_files import CONFIG, left_out
from ...files.ownership import write_manifest
from ...files.safetensors_index import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorLocation,
    header_bytes,
    read_header,
    read_index,
    some,
)
from ...files.staging import staged_folder
from ...files.temporary import move_file
from ...files.writing import create, place_file, write_json, write_new
from ...kernels.spec import IndexerConfig, IndexerWeights
from .config import dsa_config
from .names import INDEXER_SHARD, MANIFEST, REPORT, UNPROVEN_CONFIG, file_names

_MANIFEST_ENTRIES = {"format", "versions", "source", "indexer", "report", "files"}
_INDEXER_DTYPES = tuple(map(torch_dtype, MODEL_DTYPES))


def write_dsa_checkpoint(
    source: Path,
    out: Path,
    weights: Mapping[str, IndexerWeights],
    config: IndexerConfig,
    *,
    manifest: Mapping[str, object],
    dtype: torch.dtype = torch.bfloat16,
    dropped: Sequence[str] = (),
    overwrite: bool = False,
    prove: Callable[[Path], Mapping[str, object]] | None = None,
) -> Path:
    """Write the checkpoint in `source` with an indexer in every layer to `out`, whole or not at all; returns `out`.

    weights: by attention module name (`model.layers.0.self_attn`); each is fetched once, in order, so that a lazy
    mapping keeps one layer in memory. MTP layers may have one, the `num_hidden_layers` others must.
    dropped: fields of the source's config.json that are not true of it; `strip` gives them back all the same.
    dtype: of wq_b, wk and weights_proj; k_norm is written in float32, as DeepSeek does: runtimes that keep LayerNorm in
    float32 get the full precision, transformers casts it to the model's dtype.
    manifest: what to record besides our own entries (model id, recipe). prove: looks at the folder before it gets its
    name, its config.json still called UNPROVEN_CONFIG; what it returns becomes report.json and the manifest's report,
    what it raises leaves nothing behind.
    Raises UserError (source unfit, weights unfit, disk full) and UsageError (`out` in the way). `source` is only read.
    """
    _check_entries(manifest)
    dense = {name: value for name, value in read_json(source / CONFIG).items() if name not in dropped}
    tensors = read_index(source)
    settings = dsa_config(dense, config, weights)
    _check_layers(source, dense, tensors, weights)
    names = file_names(source, tensors)
    with staged_folder(out, [source], overwrite=overwrite) as folder:
        entries = _fill(folder, source, dense, tensors, names, weights, _shapes(dense, config), dtype)
        write_json(folder / UNPROVEN_CONFIG, settings)
        read_index(folder)  # what is published reads back: every header, every file size
        report = prove(folder) if prove is not None else None
        if report is not None:
            write_json(folder / REPORT, report)
        move_file(folder / UNPROVEN_CONFIG, folder / CONFIG)
        write_manifest(folder, MANIFEST, {**entries, "report": report, **manifest})
    return out


def _fill(
    folder: Path,
    source: Path,
    dense: Mapping[str, Any],
    tensors: Mapping[str, TensorLocation],
    names: Mapping[str, str],
    weights: Mapping[str, IndexerWeights],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> dict[str, object]:
    """Everything but config.json and the manifest, of which what is ours to say is returned."""
    placed = [_place(source, folder, name, target) for name, target in names.items()]
    added = _write_indexers(folder / INDEXER_SHARD, weights, shapes, dtype)
    write_json(folder / INDEX_FILE, _index(source, tensors, names, added))
    about = {**_kept_config(source), "files": placed, "left_out": left_out(source, names)}
    indexer = {
        "shard": INDEXER_SHARD, "tensors": sorted(added), "mtp_layers_without": _bare_mtp(tensors, dense, weights),
    }  # fmt: skip
    return {"format": FORMAT, "versions": _versions(), "source": about, "indexer": indexer}


def _check_entries(manifest: Mapping[str, object]) -> None:
    if taken := sorted(_MANIFEST_ENTRIES & manifest.keys()):
        raise ValueError(f"manifest entries {taken} are written by write_dsa_checkpoint itself")


def strip(dsa: Path, out: Path, overwrite: bool = False) -> Path:
    """The dense checkpoint that `dsa` was made from, bit for bit, every file under its old name; returns `out`.

    What was no part of the model is not in it (`not_restored`).
    Raises UserError when `dsa` was not written by mla2dsa, or a file to restore is missing or was changed since (sizes
    and hashes as in `file_digest`), UsageError when `out` is in the way.
    """
    source = read_checkpoint_manifest(dsa)["source"]
    files = source["files"]
    for entry in files:
        _check_unchanged(dsa, entry)
    with staged_folder(out, [dsa], overwrite=overwrite) as folder:
        for entry in files:
            place_file(dsa / entry["name"], folder / entry["source_name"], link=True)
        write_new(folder / CONFIG, source["config"])
    return out


def not_restored(dsa: Path) -> list[str]:
    """Files and folders of the source that `strip` cannot give back, since they were no part of the model."""
    return list(read_checkpoint_manifest(dsa)["source"].get("left_out") or [])


def _kept_config(source: Path) -> dict[str, str]:
    text = (source / CONFIG).read_bytes()
    return {"config": text.decode(), "config_sha256": hashlib.sha256(text).hexdigest()}


def _check_layers(
    source: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorLocation],
    weights: Mapping[str, IndexerWeights],
) -> None:
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise UserError(f"{source / CONFIG}: num_hidden_layers is {layers!r}, expected a number")
    needed = [f"model.layers.{layer}.self_attn" for layer in range(layers)]
    if missing := [module for module in needed if module not in weights]:
        raise UserError(f"{some(missing)}: no indexer weights, but deepseek_v32 has an indexer in every layer")
    modules = {name.rpartition(".self_attn.")[0] + ".self_attn" for name in tensors if ".self_attn." in name}
    if unknown := [module for module in weights if module not in modules]:
        raise UserError(f"{some(unknown)}: indexer weights for a module that {source} has no tensors of")
    if present := [name for name in tensors if ".self_attn.indexer." in name]:
        raise UserError(f"{tensors[present[0]].file}: already holds indexer tensors ({some(present)})")


def _place(source: Path, folder: Path, name: str, target: str) -> dict[str, Any]:
    method = place_file(source / name, folder / target, link=True)
    return {"name": target, "source_name": name, "placed": method, **file_digest(source / name)}


def _shapes(config: Mapping[str, Any], indexer: IndexerConfig) -> dict[str, tuple[int, ...]]:
    # deepseek_v3's own defaults stand in for fields that config.json leaves out
    return IndexerWeights.shapes(indexer, config.get("hidden_size", 7168), config.get("q_lora_rank", 1536))


def _write_indexers(
    file: Path, weights: Mapping[str, IndexerWeights], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, int]:
    """Stream the new shard, one layer in memory at a time; returns bytes per tensor name."""
    if dtype not in _INDEXER_DTYPES:
        raise UserError(f"indexer dtype {dtype}: expected one of {', '.join(map(str, _INDEXER_DTYPES))}")
    kept = {name: torch.float32 if name.startswith("k_norm.") else dtype for name in shapes}
    layout = {
        f"{module}.indexer.{name}": (element_type(kept[name]).safetensors, shape)
        for module in weights
        for name, shape in shapes.items()
    }
    with create(file) as stream:
        stream.write(header_bytes(layout, {"format": "pt"}))
        for module in weights:
            tensors = weights[module].tensors()
            for name, shape in shapes.items():
                tensor = _checked(f"{module}.indexer.{name}", tensors[name], shape, kept[name])
                stream.write(tensor.flatten().view(torch.uint8).numpy().data)
    return {name: tensor.nbytes for name, tensor in read_header(file).items()}


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name}: shape {list(tensor.shape)}, but config.json and the indexer sizes give {list(shape)}")
    result = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if not torch.isfinite(result).all():
        cause = f"does not fit {dtype}" if torch.isfinite(tensor).all() else "was NaN or infinite before"
        raise UserError(f"{name}: not finite as {dtype} (a value {cause}); calibrate again or choose float32")
    return result


def _index(
    source: Path, tensors: Mapping[str, TensorLocation], names: Mapping[str, str], added: Mapping[str, int]
) -> dict[str, Any]:
    sharded = SINGLE_FILE not in names
    metadata = read_json(source / INDEX_FILE).get("metadata") if sharded else None
    weight_map = {name: names[place.file.name] for name, place in tensors.items()}
    weight_map |= dict.fromkeys(added, INDEXER_SHARD)
    total = sum(place.nbytes for place in tensors.values()) + sum(added.values())
    metadata = {**(metadata or {}), "total_size": total}
    metadata.pop("total_parameters", None)  # packed formats make it a guess, and nothing reads it
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _bare_mtp(
    tensors: Mapping[str, TensorLocation], config: Mapping[str, Any], weights: Mapping[str, IndexerWeights]
) -> list[str]:
    """MTP layers (after num_hidden_layers) left without an indexer: the model runs, its own speculation does not."""
    modules = {name.rpartition(".kv_b_proj.")[0] for name in tensors if ".self_attn.kv_b_proj." in name}
    layers = {f"model.layers.{layer}.self_attn" for layer in range(config["num_hidden_layers"])}
    return sorted(modules - layers - set(weights))


def _versions() -> dict[str, str]:
    found = {"mla2dsa": __version__, "torch": torch.__version__}
    try:
        found["transformers"] = version("transformers")
    except PackageNotFoundError:
        found["transformers"] = "not installed"
    return found


def _check_unchanged(dsa: Path, entry: Mapping[str, Any]) -> None:
    file = dsa / entry["name"]
    if not file.exists():
        raise UserError(f"{file}: missing, but needed to restore {entry['source_name']}; fetch it again")
    found = file_digest(file)
    for field in ("size", "hashed", "sha256"):
        if found[field] != entry[field]:
            raise UserError(
                f"{file}: changed since the conversion ({field} {found[field]}, was {entry[field]}), so the dense "
                "checkpoint cannot be restored bit for bit; put the original file back"
            )
