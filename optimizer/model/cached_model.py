"""A checkpoint as a program with caches, no weight read: where exports and generation start.

A DSA checkpoint's dense base is captured and rewritten as in a conversion: a DSA checkpoint is a dense one plus indexers, so there is no
second modelling code. A dense one is captured the same way, and not rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError, short
from ...exporters.dsa.config import SHARED_FIELD, SHARING_FIELDS
from ...exporters.dsa.families import GLM, LAYOUTS, OWN, V32, base_of
from ...files.manifests.checkpoint_manifest import CHECKPOINT_MANIFEST, is_converted, read_checkpoint_manifest
from ...files.model.text_model import text_config
from ...kernels.spec import IndexerConfig
from ...passes.add_cache import Cached, cached_of
from ...passes.cache_dense import DenseCached, dense_cached_of
from ...passes.manager import run_passes
from ...passes.mla_to_dsa import Rewritten
from ...passes.pipeline import cached_passes, dense_cached_passes
from ...runtime.torch_session import TorchSession
from .capture import Capture, capture, max_length, read_config
from .checkpoint import Checkpoint
from .every_tensor import SAME_REVISION, check_every_tensor, with_true_quantisation
from .free_memory import weights_that_fit
from .weights import WeightSource

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
INDEXER_FIELDS = ("index_topk", "index_n_heads", "index_head_dim", "indexer_rope_interleave")
_KINDS = {"F": "full", "S": "shared"}
_DSA_ONLY = (*INDEXER_FIELDS, *SHARING_FIELDS, SHARED_FIELD, "layer_types", "mlp_bias")
_MAX_POSITION_EMBEDDINGS = {V32.model_type: 163840, GLM.model_type: 202752}  # their defaults; deepseek_v3's is another


@dataclass(frozen=True)
class CachedModel:
    """A checkpoint with its cached program; no weights read."""

    checkpoint: Checkpoint
    captured: Capture
    indexer: IndexerConfig
    cached: Cached
    source: WeightSource


def open_cached(checkpoint: Checkpoint, dtype: torch.dtype, last_only: bool, device: str = "cpu") -> CachedModel:
    """Raises UserError when `checkpoint` has no indexers, or tensors that do not fit its config.json."""
    if not checkpoint.is_dsa():
        raise UserError(f"{checkpoint.path}: a dense checkpoint (no indexer); run `mla2dsa convert` first")
    with_true_quantisation(checkpoint)
    config = dense_config(checkpoint)
    _check_every_layer(checkpoint)
    indexer = indexer_of(checkpoint)
    captured = capture(config, dtype=dtype)
    run = run_passes(captured.program, cached_passes(indexer, last_only))
    source = WeightSource(checkpoint, captured, device)
    shapes = {name: tuple(run.program.state_dict[name].shape) for name in run.fact(Rewritten).added}
    checkpoint.check_shapes({**source.expected(), **shapes})
    check_every_tensor(source, shapes)
    return CachedModel(checkpoint, captured, indexer, cached_of(run), source)


@dataclass(frozen=True)
class DenseModel:
    """A dense checkpoint with its cached program; no weights read."""

    captured: Capture
    cached: DenseCached
    source: WeightSource


def open_dense(checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> DenseModel:
    """Raises UserError for a model with other layers than MLA, or tensors that do not fit its config.json."""
    checkpoint = with_true_quantisation(checkpoint)
    captured = capture(checkpoint.config, dtype=dtype)
    layers = int(getattr(read_config(checkpoint.config).get_text_config(), "num_hidden_layers", 0))
    cached = dense_cached_of(run_passes(captured.program, dense_cached_passes(True, layers)))
    source = WeightSource(checkpoint, captured, device)
    checkpoint.check_shapes(source.expected())
    check_every_tensor(source)
    return DenseModel(captured, cached, source)


def _check_every_layer(checkpoint: Checkpoint) -> None:
    """Raises UserError for a hybrid: only the DSA ops may mix tokens, or what the others did with earlier ones would be lost."""
    layers = checkpoint.config.get("num_hidden_layers")
    if layout_name(checkpoint.config) != OWN or not isinstance(layers, int):
        return
    sparse = {int(found[1]) for name in checkpoint.tensors if ".indexer." in name and (found := _LAYER.search(name))}
    others = [str(layer) for layer in range(layers) if layer not in sparse]
    if len(others) > len(shared_layers(checkpoint)):
        raise UserError(
            f"{checkpoint.path}: layers {', '.join(others)} are linear attention, which keeps a state between tokens that a graph "
            "with caches has no place for yet: such a model is converted, verified and stripped, but not exported or run"
        )


def dense_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of the dense base: that of the DSA checkpoint, which is the truth about the model.

    A DSA class's is told as deepseek_v3's (`base_of`); in the own layout it is the dense one's but for the indexer's sizes. What
    was edited after a conversion is obeyed, as transformers obeys it. Raises UserError naming the field where deepseek_v3 cannot
    say it, or where it contradicts what the conversion wrote.
    """
    if fault := _contradiction(checkpoint.config, _layout_of(checkpoint)):
        raise UserError(f"{checkpoint.path / checkpoint.config_file}: {fault}")
    return dense_words(checkpoint.config)


def dense_words(dsa: Mapping[str, Any]) -> dict[str, Any]:
    """A DSA checkpoint's config.json, told as its dense base's."""
    if dsa.get("model_type") not in LAYOUTS:
        return {name: value for name, value in text_config(dsa).items() if name not in INDEXER_FIELDS}
    config = {name: value for name, value in dsa.items() if name not in _DSA_ONLY}
    layers = config.pop("mlp_layer_types", None)
    if layers is not None:
        config["first_k_dense_replace"] = next((i for i, kind in enumerate(layers) if kind != "dense"), len(layers))
    if (experts := config.pop("num_experts", None)) is not None:  # the DSA classes obey it, deepseek_v3 does not
        config["n_routed_experts"] = experts
    config.setdefault("max_position_embeddings", _MAX_POSITION_EMBEDDINGS[dsa["model_type"]])
    model_type, architecture = base_of(dsa)
    return {**config, "model_type": model_type, "architectures": [architecture]}


def layout_name(config: Mapping[str, Any]) -> str:
    """The layout that a DSA checkpoint's config.json is in."""
    model_type = str(config.get("model_type"))
    return model_type if model_type in LAYOUTS else OWN


def _layout_of(checkpoint: Checkpoint) -> str | None:
    """The layout that mla2dsa wrote the checkpoint in, None when it did not. Raises UserError when its manifest is damaged."""
    if not is_converted(checkpoint.path):
        return None
    return str((read_checkpoint_manifest(checkpoint.path).get("layout") or {}).get("name", V32.model_type))


def _contradiction(config: Mapping[str, Any], ours: str | None) -> str | None:
    """What a DSA checkpoint's config.json says that the graph of its dense base cannot mean. ours: the layout it was written in."""
    model_type, layout = config.get("model_type"), layout_name(config)
    if ours is not None and ours != layout:
        return f"model_type {model_type!r} with an indexer, but {CHECKPOINT_MANIFEST} says {ours}"
    if layout == OWN:
        return None
    if config.get("rope_interleave", True) is not True:
        return (
            f"rope_interleave is {config['rope_interleave']}, but {layout} rotates MLA in interleaved pairs; remove it"
        )
    if config.get("mlp_bias"):
        return "mlp_bias is true, which no dense base has; set it to false"
    interleaved, written = LAYOUTS[layout].interleaved, "in pairs" if LAYOUTS[layout].interleaved else "half-split"
    found = config.get("indexer_rope_interleave")
    if ours and found is not None and found != interleaved:
        told = str(interleaved).lower()
        return f"indexer_rope_interleave is {str(found).lower()}, but the indexers were written {written}; set it to {told}"
    kinds = config.get("layer_types")
    if kinds is not None and set(kinds) != {"indexed_attention"}:
        return f"layer_types has {sorted(set(kinds) - {'indexed_attention'})}, but every layer here has an indexer; remove it"
    layers = config.get("mlp_layer_types") or []
    if "dense" in layers[next((i for i, kind in enumerate(layers) if kind != "dense"), len(layers)) :]:
        return "mlp_layer_types has dense layers after sparse ones"
    return None


def context_of(checkpoint: Checkpoint) -> int:
    """Most tokens of a sequence, as config.json and the defaults of its class say."""
    config = dense_config(checkpoint) if checkpoint.is_dsa() else checkpoint.config
    return max_length(read_config(config))


def indexer_of(checkpoint: Checkpoint) -> IndexerConfig:
    """Sizes of the indexers in a DSA checkpoint. Raises UserError naming the field that does not say."""
    config, file = checkpoint.config, checkpoint.path / checkpoint.config_file
    sizes: dict[str, Any] = {field: config.get(field) for field in ("index_topk", "index_n_heads", "index_head_dim")}
    for field, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{file}: {field} is {size!r}, expected a positive number")
    interleaved = config.get("indexer_rope_interleave", config.get("model_type") == GLM.model_type)
    return IndexerConfig(**sizes, rope_interleave=bool(interleaved), shared=shared_layers(checkpoint))


def shared_layers(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Numbers of the layers without an indexer, which attend to what the last layer before them selected (GLM-5.2).

    Read as transformers' glm_moe_dsa reads it. Raises UserError naming the field when it means no such model.
    """
    config, file = checkpoint.config, checkpoint.path / checkpoint.config_file
    if layout_name(config) == OWN and (own := config.get(SHARED_FIELD)) is not None:
        if not isinstance(own, list) or not all(type(number) is int for number in own) or sorted(set(own)) != own:
            raise UserError(f"{file}: {SHARED_FIELD} is {short(own)}, expected numbers of layers in ascending order")
        return tuple(own)
    field, kinds = _indexer_kinds(config, file)
    layers = config.get("num_hidden_layers")
    kinds = kinds[:layers]
    shared = tuple(layer for layer, kind in enumerate(kinds) if kind == "shared")
    if layout_name(config) != GLM.model_type:
        if shared:
            raise UserError(
                f"{file}: {field} shares indexers between layers, which of the classes here only {GLM.model_type} does; remove it "
                "if every layer has an indexer"
            )
        return ()
    if strange := sorted(set(kinds) - {"full", "shared"}):
        raise UserError(f"{file}: {field} has {short(strange[0])!r}, expected full or shared for every layer")
    if layers is not None and len(kinds) != layers:
        raise UserError(f"{file}: {field} has {len(kinds)} layers, num_hidden_layers is {layers}; {SAME_REVISION}")
    if shared[:1] == (0,):
        raise UserError(
            f"{file}: {field} has the first layer share a selection, and there is none before it; {SAME_REVISION}"
        )
    return shared


def _indexer_kinds(config: Mapping[str, Any], file: Path) -> tuple[str, list[str]]:
    """The field that says it, and `full` or `shared` per layer."""
    if (listed := config.get("indexer_types")) is not None:
        return "indexer_types", list(listed)
    if (pattern := config.get("index_topk_pattern")) is not None:
        if not isinstance(pattern, str | list):
            raise UserError(f"{file}: index_topk_pattern is {short(pattern)}, expected a letter a layer, F or S")
        return "index_topk_pattern", [_KINDS.get(str(kind), str(kind)) for kind in pattern]
    step, first = (
        default if (value := config.get(name)) is None else value
        for name, default in (("index_topk_freq", 1), ("index_skip_topk_offset", 2))
    )
    if type(step) is not int or type(first) is not int:
        raise UserError(
            f"{file}: index_topk_freq is {short(step)}, index_skip_topk_offset {short(first)}: expected numbers"
        )
    layers = range(config.get("num_hidden_layers") or 0)
    return "index_topk_freq", ["shared" if max(layer - first + 1, 0) % max(step, 1) else "full" for layer in layers]


def open_torch_session(
    folder: Path, batch: int, capacity: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TorchSession:
    """A session on a checkpoint, DSA or dense. capacity None: the model's context. Raises UserError."""
    checkpoint = Checkpoint.open(folder)
    sparse = checkpoint.is_dsa()
    model = open_cached(checkpoint, dtype, True, device) if sparse else open_dense(checkpoint, dtype, device)
    context = model.captured.max_length
    if capacity is not None and capacity > context:
        raise UserError(f"a cache of {capacity} tokens is longer than the model's {context} positions")
    program, load = model.cached.program, model.source.loader(model.cached.program)
    advice = "pass --dtype bfloat16, which takes half, or " if dtype == torch.float32 else ""
    promised = weights_that_fit(checkpoint.path, program.state_dict, model.captured.tied, dtype, device, advice)
    widths = {f"past_{name}": width for cache in model.cached.caches for name, width in cache.widths.items()}
    return TorchSession(program, promised.counted(load), widths, batch, capacity or context, dtype, device)
