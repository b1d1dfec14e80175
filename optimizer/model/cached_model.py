"""A DSA checkpoint as a program with caches, no weight read: where exports and generation start.

Its dense base is captured and rewritten as in a conversion: a DSA checkpoint is a dense one plus indexers, so there is no
second modelling code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...exporters.dsa.checkpoint import MANIFEST as DSA_MANIFEST
from ...files.json_files import read_json
from ...kernels.spec import IndexerConfig
from ...passes.add_cache import Cached, cached_of
from ...passes.manager import run_passes
from ...passes.mla_to_dsa import Rewritten
from ...passes.pipeline import cached_passes
from ...runtime.torch_session import TorchSession
from .capture import Capture, capture
from .checkpoint import Checkpoint
from .every_tensor import check_every_tensor, with_true_quantisation
from .weights import WeightSource

_V32_ONLY = ("index_topk", "index_n_heads", "index_head_dim", "indexer_rope_interleave", "indexer_types")


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
    """config.json of the dense base: the one the manifest keeps, or a native deepseek_v32 told as deepseek_v3.

    Raises UserError when the checkpoint is neither.
    """
    if (checkpoint.path / DSA_MANIFEST).is_file():
        kept = read_json(checkpoint.path / DSA_MANIFEST).get("source")
        text = kept.get("config") if isinstance(kept, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{checkpoint.path / DSA_MANIFEST}: damaged (no source config); fetch it again")
        dense: dict[str, Any] = json.loads(text)
        return dense
    config = {name: value for name, value in checkpoint.config.items() if name not in _V32_ONLY}
    if config.get("model_type") != "deepseek_v32":
        raise UserError(
            f"{checkpoint.path / 'config.json'}: model_type {config.get('model_type')!r} with an indexer, but no {DSA_MANIFEST}; "
            "only deepseek_v32 is known without one"
        )
    layers = config.pop("mlp_layer_types", None)
    config.pop("layer_types", None)
    if layers is not None:
        dense_layers = next((i for i, kind in enumerate(layers) if kind != "dense"), len(layers))
        if "dense" in layers[dense_layers:]:
            raise UserError(f"{checkpoint.path / 'config.json'}: mlp_layer_types has dense layers after sparse ones")
        config["first_k_dense_replace"] = dense_layers
    return {**config, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}


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
