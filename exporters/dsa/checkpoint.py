"""The DSA checkpoint on disk: the dense one as it is, plus one shard of indexers (`strip.py` is the way back).

    dense/                                    dsa/
      config.json                               config.json                     a DSA class's, or the dense one's; index_topk ...
      model-00001-of-00002.safetensors   ==     model-00001-of-00002.safetensors  (hard link)
      model-00002-of-00002.safetensors   ==     model-00002-of-00002.safetensors  (hard link)
                                                model-indexer.safetensors       5 tensors a layer
      model.safetensors.index.json       ->     model.safetensors.index.json    all tensors
                                                mla2dsa.source-index.json       the dense index, for `strip`
      tokenizer.json ...                 ->     tokenizer.json ...              (copy)
      README.md                          ->     mla2dsa.source-README.md        (copy)
                                                README.md                       the card of the sparse model (`card.py`)
                                                mla2dsa-recipe.yaml             what gives it again, bit for bit
                                                report.json, report.html        what was found, and the same as a page
                                                mla2dsa.json                    manifest

Weights are hard-linked: never write into them. The other files are copies, since people do edit those in place. What is no
part of the model (scripts, images) stays behind (`files/model/model_files.py`): it speaks of the dense one.
Where a family's rule folds something, or multi-token prediction is dropped, the shards concerned are written anew (`shards.py`).
config.json gets its name after the proof: a folder that a killed run leaves is no checkpoint to anybody. The manifest is
the last file, and lists all others.
A source with a single `model.safetensors` has it linked as `model-dense.safetensors`: transformers would load a file of
the first name alone and never look at the index.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
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
from ...files.manifests.checkpoint_manifest import FORMAT
from ...files.model.model_files import CONFIG, left_out
from ...files.model.text_model import is_wrapper, stored_module, text_config
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
from .card import write_card
from .config import dsa_config
from .folding import pairs
from .folds import Folding
from .layout import Layout, choose
from .names import (
    DERIVED_SHARD,
    INDEXER_SHARD,
    MANIFEST,
    ORIGINALS,
    PAGE,
    RECIPE,
    REPORT,
    UNPROVEN_CONFIG,
    file_names,
)
from .shards import write_derived, write_originals, write_shard
from .steps import Interleave

_MANIFEST_ENTRIES = {"format", "versions", "source", "indexer", "layout", "report", "files"}
_INDEXER_DTYPES = tuple(map(torch_dtype, MODEL_DTYPES))
_PLAIN = ("F64", "F32", "F16", "BF16")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class _Source:
    """What is written, before any of it is. config: of the dense model, tensors: its; names: of its files there and here."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorLocation]
    names: Mapping[str, str]
    layout: Layout
    folding: Folding
    mtp: Collection[str]


def write_dsa_checkpoint(
    source: Path,
    out: Path,
    weights: Mapping[str, IndexerWeights],
    config: IndexerConfig,
    *,
    manifest: Mapping[str, object], layout: Layout | None = None, q_width: int | None = None, mtp: Collection[str] = (),
    dtype: torch.dtype = torch.bfloat16, dropped: Sequence[str] = (), recipe: str = "", overwrite: bool = False,
    prove: Callable[[Path], Mapping[str, object]] | None = None, draw: Callable[[Mapping[str, object]], str | None] | None = None,
) -> Path:  # fmt: skip
    """Write the checkpoint in `source` with an indexer in every MLA layer to `out`, whole or not at all; returns `out`.

    weights: by attention module name (`model.layers.0.self_attn`), half-split; each is fetched once, in order. In a DSA class's
    layout MTP layers may have one, the `num_hidden_layers` others must, but for those that share (`config.shared`).
    layout: None takes the first that fits; q_width: of what the indexers read (None: as config.json says); mtp: the source's tensors
    of multi-token-prediction layers. dropped: fields of its config.json that are not true; `strip` gives them back all the same.
    dtype: of wq_b, wk and weights_proj; k_norm is written in float32, as DeepSeek does.
    manifest: what to record besides our own entries; recipe: the text of RECIPE, which lies beside (none: no such file).
    prove: looks at the folder before it gets its name, its config.json still
    called UNPROVEN_CONFIG; what it returns becomes report.json and the manifest's report, what it raises leaves nothing behind.
    draw: makes a page of that, report.html; None for no such file.
    Raises UserError (source unfit, weights unfit, disk full) and UsageError (`out` in the way). `source` is only read.
    """
    _check_entries(manifest)
    given = _opened(source, layout, mtp, dropped)
    settings = _settings(given, config, weights)
    _check_layers(given, settings, weights)
    shapes = _shapes(settings, config, q_width)
    with staged_folder(out, [source], overwrite=overwrite) as folder:
        entries = _fill(folder, given, weights, shapes, dtype, settings)
        write_json(folder / UNPROVEN_CONFIG, settings)
        read_index(folder)  # what is published reads back: every header, every file size
        report = _proved(folder, prove, draw)
        if recipe:
            write_new(folder / RECIPE, recipe)
        write_card(folder, source, manifest, report)
        move_file(folder / UNPROVEN_CONFIG, folder / CONFIG)
        write_manifest(folder, MANIFEST, {**entries, "report": report, **manifest})
    return out


def _settings(given: _Source, config: IndexerConfig, weights: Mapping[str, IndexerWeights]) -> dict[str, Any]:
    """The config.json."""
    modules, plain = [_stored_module(given, module) for module in weights], _plain_modules(given.folding)
    return dsa_config(given.config, config, modules, given.layout, _mtp_layers(given), plain)


def _proved(
    folder: Path,
    prove: Callable[[Path], Mapping[str, object]] | None,
    draw: Callable[[Mapping[str, object]], str | None] | None,
) -> Mapping[str, object] | None:
    report = prove(folder) if prove is not None else None
    if report is not None:
        write_json(folder / REPORT, report)
        made = draw(report) if draw is not None else None
        if made is not None:
            write_new(folder / PAGE, made)
    return report


def _opened(source: Path, layout: Layout | None, mtp: Collection[str], dropped: Sequence[str]) -> _Source:
    dense = {name: value for name, value in read_json(source / CONFIG).items() if name not in dropped}
    tensors = read_index(source)
    layout = layout or choose(dense, tensors)
    folding = layout.folding(dense, tensors, mtp)
    return _Source(source, dense, tensors, file_names(source, tensors), layout, folding, mtp)


def _fill(
    folder: Path,
    given: _Source,
    weights: Mapping[str, IndexerWeights],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> dict[str, object]:
    """Everything but config.json and the manifest, of which what is ours to say is returned."""
    gone, aside = given.folding.replaced, _dropped_shards(given)
    anew = {given.tensors[name].file.name for name in gone} - aside
    placed = [
        _rewrite(given.path, folder, name, target, gone) if name in anew
        else _place(given.path, folder, name, f"{ORIGINALS}-{Path(name).stem}" if name in aside else target)
        for name, target in given.names.items()
    ]  # fmt: skip
    derived = write_derived(folder, given.folding)
    if anew:
        write_originals(folder, [given.path / name for name in sorted(anew)], given.folding, aside)
    stored = {module: _stored_module(given, module) for module in weights}
    added = _write_indexers(folder / INDEXER_SHARD, weights, stored, shapes, dtype, _rotary(given.layout, settings))
    write_json(folder / INDEX_FILE, _index(given, derived, added))
    about = {**_kept_config(given.path), "files": placed, "left_out": left_out(given.path, given.names)}
    indexer = {
        "shard": INDEXER_SHARD, "tensors": sorted(added), "mtp_layers_without": _bare_mtp(given, weights),
    }  # fmt: skip
    return {"format": FORMAT, "versions": _versions(), "source": about, "indexer": indexer, "layout": _layout(given)}


def _dropped_shards(given: _Source) -> set[str]:
    """Files of the source of which every tensor is dropped: they are linked aside, for `strip`, under names that nothing loads."""
    kept = {place.file.name for name, place in given.tensors.items() if name not in given.folding.dropped}
    return {place.file.name for place in given.tensors.values()} - kept


def _layout(given: _Source) -> dict[str, object]:
    """The manifest's word on how this is written."""
    layout, folding = given.layout, given.folding
    return {
        "name": layout.name, "why": layout.why, "family": layout.family.name if layout.family else None,
        "query_form": layout.forms[0] if layout.forms else None,
        "derived": [made.to_json() for made in folding.derived.values()], "dropped": sorted(folding.dropped),
    }  # fmt: skip


def _check_entries(manifest: Mapping[str, object]) -> None:
    if taken := sorted(_MANIFEST_ENTRIES & manifest.keys()):
        raise ValueError(f"manifest entries {taken} are written by write_dsa_checkpoint itself")


def _kept_config(source: Path) -> dict[str, str]:
    text = (source / CONFIG).read_bytes()
    return {"config": text.decode(), "config_sha256": hashlib.sha256(text).hexdigest()}


def _check_layers(given: _Source, settings: Mapping[str, Any], weights: Mapping[str, IndexerWeights]) -> None:
    tensors, source = given.tensors, given.path
    if present := [name for name in tensors if ".indexer." in name]:
        raise UserError(f"{tensors[present[0]].file}: already holds indexer tensors ({some(present)})")
    if given.layout.target is None:
        return  # the modules are the graph's
    layers = settings.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise UserError(f"{source / CONFIG}: num_hidden_layers is {layers!r}, expected a number")
    shared = [layer for layer, kind in enumerate(settings.get("indexer_types") or ()) if kind == "shared"]
    needed = [f"model.layers.{layer}.self_attn" for layer in range(layers) if layer not in shared]
    if missing := [module for module in needed if module not in weights]:
        target = given.layout.target.model_type
        raise UserError(f"{some(missing)}: no indexer weights, but {target} has an indexer in every layer")
    modules = {name.rpartition(".self_attn.")[0] + ".self_attn" for name in tensors if ".self_attn." in name}
    if unknown := [module for module in weights if module not in modules]:
        raise UserError(f"{some(unknown)}: indexer weights for a module that {source} has no tensors of")


def _place(source: Path, folder: Path, name: str, target: str) -> dict[str, Any]:
    method = place_file(source / name, folder / target, link=True)
    return {"name": target, "source_name": name, "placed": method, **file_digest(folder / target)}


def _rewrite(source: Path, folder: Path, name: str, target: str, gone: set[str]) -> dict[str, Any]:
    digest = write_shard(source / name, folder / target, gone)
    return {"name": target, "source_name": name, "placed": "rewritten", **digest, "hashed": digest["size"]}


def _stored_module(given: _Source, module: str) -> str:
    return stored_module(module, given.tensors) if is_wrapper(given.config) else module


def _shapes(settings: Mapping[str, Any], indexer: IndexerConfig, q_width: int | None) -> dict[str, tuple[int, ...]]:
    text = text_config(settings)
    latent = text.get("q_lora_rank") or q_width or text["hidden_size"]
    return IndexerWeights.shapes(indexer, text["hidden_size"], latent)


def _rotary(layout: Layout, settings: Mapping[str, Any]) -> Mapping[str, Interleave]:
    """By tensor, how its rotary rows are moved for a class that rotates the indexer in pairs: q and k alike, so that scores are
    the same."""
    if layout.target is None or not layout.target.interleaved:
        return {}
    rope = settings["qk_rope_head_dim"]
    one = Interleave(1, 0, rope)
    return {"wq_b.weight": Interleave(settings["index_n_heads"], 0, rope), "wk.weight": one, "k_norm.weight": one,
            "k_norm.bias": one}  # fmt: skip


def _write_indexers(
    file: Path,
    weights: Mapping[str, IndexerWeights],
    stored: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    rotary: Mapping[str, Interleave],
) -> dict[str, int]:
    """Stream the new shard, one layer in memory at a time; returns bytes per tensor name. stored: what each module is called in it."""
    if dtype not in _INDEXER_DTYPES:
        raise UserError(f"indexer dtype {dtype}: expected one of {', '.join(map(str, _INDEXER_DTYPES))}")
    kept = {name: torch.float32 if name.startswith("k_norm.") else dtype for name in shapes}
    layout = {
        f"{stored[module]}.indexer.{name}": (element_type(kept[name]).safetensors, shape)
        for module in weights
        for name, shape in shapes.items()
    }
    with create(file) as stream:
        stream.write(header_bytes(layout, {"format": "pt"}))
        for module in weights:
            tensors = weights[module].tensors()
            for name, shape in shapes.items():
                tensor = _widened(tensors[name], shape) if name == "wq_b.weight" else tensors[name]
                tensor = _checked(f"{module}.indexer.{name}", tensor, shape, kept[name])
                tensor = pairs(tensor, rotary[name]) if name in rotary else tensor
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


def _widened(wq_b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A query latent that was made up holds the hidden state and then what the indexer has no use for (`BiasQuery`)."""
    missing = shape[1] - wq_b.shape[1] if wq_b.dim() == 2 else 0
    return torch.nn.functional.pad(wq_b, (0, missing)) if missing > 0 else wq_b


def _index(given: _Source, derived: Mapping[str, int], added: Mapping[str, int]) -> dict[str, Any]:
    sharded = SINGLE_FILE not in given.names
    metadata = read_json(given.path / INDEX_FILE).get("metadata") if sharded else None
    gone = given.folding.replaced
    kept = {name: place for name, place in given.tensors.items() if name not in gone}
    weight_map = {name: given.names[place.file.name] for name, place in kept.items()}
    weight_map |= dict.fromkeys(derived, DERIVED_SHARD) | dict.fromkeys(added, INDEXER_SHARD)
    total = sum(place.nbytes for place in kept.values()) + sum(derived.values()) + sum(added.values())
    metadata = {**(metadata or {}), "total_size": total}
    metadata.pop("total_parameters", None)  # packed formats make it a guess, and nothing reads it
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _bare_mtp(given: _Source, weights: Mapping[str, IndexerWeights]) -> list[str]:
    """MTP layers (after num_hidden_layers) left without an indexer: the model runs, its own speculation does not."""
    names = [name for name in given.tensors if ".self_attn.kv_b_proj." in name and name not in given.folding.dropped]
    count = text_config(given.config).get("num_hidden_layers") or 0
    after = [name for name in names if (layer := _LAYER.search(name)) and int(layer[1]) >= count]
    return sorted({name.rpartition(".kv_b_proj.")[0] for name in after} - set(weights)) if count else []


def _mtp_layers(given: _Source) -> int:
    """Multi-token-prediction layers in the DSA checkpoint."""
    if given.layout.mtp == "drop":
        return 0
    return len({layer[1] for name in given.mtp if (layer := _LAYER.search(name))})


def _plain_modules(folding: Folding) -> list[str]:
    """Modules whose weights a fold made, and that no quantisation is about."""
    made = [it.name for it in folding.derived.values() if it.dtype in _PLAIN and len(it.shape) == 2]
    return [name.removesuffix(".weight") for name in made if name.endswith(".weight")]


def _versions() -> dict[str, str]:
    found = {"mla2dsa": __version__, "torch": torch.__version__}
    try:
        found["transformers"] = version("transformers")
    except PackageNotFoundError:
        found["transformers"] = "not installed"
    return found
