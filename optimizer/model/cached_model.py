"""A DSA checkpoint as a program with caches, no weight read: where exports and generation start.

Its dense base is captured and rewritten as in a conversion: a DSA checkpoint is a dense one plus indexers, so there is no
second modelling code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...files.manifests.checkpoint_manifest import CHECKPOINT_MANIFEST, is_converted, read_checkpoint_manifest
from ...kernels.spec import IndexerConfig
from ...passes.add_cache import Cached, cached_of
from ...passes.manager import run_passes
from ...passes.mla_to_dsa import Rewritten
from ...passes.pipeline import cached_passes
from ...runtime.torch_session import TorchSession
from .capture import Capture, capture, max_length, read_config
from .checkpoint import Checkpoint
from .every_tensor import check_every_tensor, with_true_quantisation
from .weights import WeightSource

_V32_ONLY = (
    "index_topk", "index_n_heads", "index_head_dim", "indexer_rope_interleave", "indexer_types", "layer_types", "mlp_bias",
)  # fmt: skip
_V32_MAX_POSITION_EMBEDDINGS = 163840  # its default; deepseek_v3's is another


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
    indexer = _indexer(checkpoint)
    captured = capture(config, dtype=dtype)
    run = run_passes(captured.program, cached_passes(indexer, last_only))
    source = WeightSource(checkpoint, captured, device)
    shapes = {name: tuple(run.program.state_dict[name].shape) for name in run.fact(Rewritten).added}
    checkpoint.check_shapes({**source.expected(), **shapes})
    check_every_tensor(source, shapes)
    return CachedModel(checkpoint, captured, indexer, cached_of(run), source)


def dense_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of the dense base: that of the DSA checkpoint, which is the truth about the model, told as deepseek_v3's.

    What was edited after a conversion is obeyed, as transformers obeys it. Raises UserError naming the field where
    deepseek_v3 cannot say it, or where it contradicts what the conversion wrote.
    """
    ours = _check_manifest(checkpoint)
    config = {name: value for name, value in checkpoint.config.items() if name not in _V32_ONLY}
    if fault := _contradiction(checkpoint.config, ours):
        raise UserError(f"{checkpoint.path / checkpoint.config_file}: {fault}")
    layers = config.pop("mlp_layer_types", None)
    if layers is not None:
        config["first_k_dense_replace"] = next((i for i, kind in enumerate(layers) if kind != "dense"), len(layers))
    if (experts := config.pop("num_experts", None)) is not None:  # deepseek_v32 obeys it, deepseek_v3 does not
        config["n_routed_experts"] = experts
    config.setdefault("max_position_embeddings", _V32_MAX_POSITION_EMBEDDINGS)
    return {**config, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}


def _check_manifest(checkpoint: Checkpoint) -> bool:
    """Whether mla2dsa wrote the checkpoint. Raises UserError when its manifest is damaged."""
    if not is_converted(checkpoint.path):
        return False
    read_checkpoint_manifest(checkpoint.path)
    return True


def _contradiction(config: Mapping[str, Any], ours: bool) -> str | None:
    """What a deepseek_v32 config.json says that the graph of its dense base cannot mean."""
    if config.get("model_type") != "deepseek_v32":
        which = (
            f"{CHECKPOINT_MANIFEST} says deepseek_v32"
            if ours
            else f"no {CHECKPOINT_MANIFEST}; only deepseek_v32 is known without one"
        )
        return f"model_type {config.get('model_type')!r} with an indexer, but {which}"
    if config.get("rope_interleave", True) is not True:
        return f"rope_interleave is {config['rope_interleave']}, but deepseek_v32 rotates MLA in interleaved pairs; remove it"
    if config.get("mlp_bias"):
        return "mlp_bias is true, which no dense base has; set it to false"
    if ours and config.get("indexer_rope_interleave"):
        return "indexer_rope_interleave is true, but the indexers were written half-split; set it to false"
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


def _indexer(checkpoint: Checkpoint) -> IndexerConfig:
    config, file = checkpoint.config, checkpoint.path / "config.json"
    sizes: dict[str, Any] = {field: config.get(field) for field in ("index_topk", "index_n_heads", "index_head_dim")}
    for field, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{file}: {field} is {size!r}, expected a positive number")
    if set(config.get("indexer_types") or ["full"]) != {"full"}:
        raise UserError(f"{file}: indexer_types shares indexers between layers, which cannot be exported yet")
    return IndexerConfig(**sizes, rope_interleave=bool(config.get("indexer_rope_interleave", False)))


def open_torch_session(
    folder: Path, batch: int, capacity: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TorchSession:
    """A session on a DSA checkpoint. capacity None: the model's context. Raises UserError."""
    model = open_cached(Checkpoint.open(folder), dtype, last_only=True, device=device)
    context = model.captured.max_length
    if capacity is not None and capacity > context:
        raise UserError(f"a cache of {capacity} tokens is longer than the model's {context} positions")
    program, load = model.cached.program, model.source.loader(model.cached.program)
    widths = {f"past_{c.latent}": c.latent_width for c in model.cached.caches}
    widths |= {f"past_{c.index_key}": c.index_key_width for c in model.cached.caches}
    return TorchSession(program, load, widths, batch, capacity or context, dtype, device)
