"""Indexer weights from a checkpoint that has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...errors import UserError
from ...kernels.spec import INDEXER_TENSORS, IndexerConfig, IndexerWeights
from ...passes.matching.sites import MlaSite
from .cached_model import shared_layers
from .checkpoint import Checkpoint

_SIZES = ("index_topk", "index_n_heads", "index_head_dim")


@dataclass(frozen=True)
class Donor:
    """A DSA checkpoint and its indexer's sizes. interleaved: its rotary channels alternate (GLM's layout)."""

    checkpoint: Checkpoint
    config: IndexerConfig
    interleaved: bool

    @classmethod
    def open(cls, model: str) -> Donor:
        """Raises UserError when `model` cannot be opened, has no indexers, or layers without one.

        What a layer shares is a selection made from another layer's hidden states: there are no weights that would make it
        from its own, and those of the layer it comes from were trained on other inputs. So none are taken for it.
        """
        checkpoint = Checkpoint.open(model)
        config: Mapping[str, object] = checkpoint.config
        missing = [name for name in _SIZES if not isinstance(config.get(name), int)]
        if missing or not any(".indexer." in name for name in checkpoint.tensors):
            raise UserError(
                f"{model}: no donor of indexers ({missing[0] + ' in config.json' if missing else 'indexer tensors'} missing)"
            )
        if shared := shared_layers(checkpoint):
            layers = ", ".join(map(str, shared[:3])) + (" ..." if len(shared) > 3 else "")
            raise UserError(
                f"donor {checkpoint.path}: no indexer in {len(shared)} of its layers ({layers}), which share the selection of an "
                "earlier one (GLM-5.2), so there is nothing to take for them; take a donor with an indexer in every layer, or "
                "--indexer closed-form"
            )
        topk, heads, width = (int(str(config[name])) for name in _SIZES)
        interleaved = bool(config.get("indexer_rope_interleave", config.get("model_type") == "glm_moe_dsa"))
        return cls(checkpoint, IndexerConfig(topk, heads, width), interleaved)

    def check(self, sites: tuple[MlaSite, ...]) -> None:
        """Raises UserError naming the first tensor that is missing or of another size than a site needs."""
        for site in sites:
            shapes = IndexerWeights.shapes(self.config, site.dims.hidden_size, site.dims.q_width)
            for name, shape in shapes.items():
                self._check_tensor(f"{site.name}.indexer.{name}", shape)

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        place = self.checkpoint.tensors.get(name)
        if place is None or place.shape != shape:
            found = f"is {list(place.shape)}" if place else "is missing"
            raise UserError(
                f"donor {self.checkpoint.path}: {name} {found}, this model needs {list(shape)}; take a donor with as many "
                "layers, the same hidden_size and the same q_lora_rank"
            )

    def mtp_modules(self, checkpoint: Checkpoint, sites: tuple[MlaSite, ...]) -> tuple[str, ...]:
        """Attention modules of the multi-token-prediction layers of `checkpoint`, if this has an indexer of the right size for each
        of them; else none. No text goes through those layers here, so there is no other way to give them one."""
        ends = ".kv_b_proj.weight"
        found = sorted(
            name.removesuffix(ends) for name in checkpoint.mtp_tensors() if name.endswith(f".self_attn{ends}")
        )
        dims = sites[0].dims
        shapes = IndexerWeights.shapes(self.config, dims.hidden_size, dims.q_width)
        tensors = self.checkpoint.tensors
        needed = [(f"{module}.indexer.{name}", shape) for module in found for name, shape in shapes.items()]
        fits = all(name in tensors and tensors[name].shape == shape for name, shape in needed)
        return tuple(found) if fits else ()

    def weights_of(self, module: str, rope: int) -> IndexerWeights:
        """Of one attention module: float32, half-split. rope: qk_rope_head_dim."""
        load = partial(self.checkpoint.load, dtype=torch.float32)
        tensors = {name: load(f"{module}.indexer.{name}") for name in INDEXER_TENSORS.values()}
        return self._half_split(IndexerWeights.from_tensors(tensors), rope)

    def weights(self, sites: tuple[MlaSite, ...]) -> Iterator[tuple[str, IndexerWeights]]:
        """(layer name, float32 weights) of every site, in half-split layout. Raises UserError on a layer that does not fit."""
        self.check(sites)
        for site in sites:
            yield site.name, self.weights_of(site.name, site.dims.qk_rope_head_dim)

    def _half_split(self, weights: IndexerWeights, rope: int) -> IndexerWeights:
        """Interleaved rotary channels (0, 1), (2, 3) ... become (0, dr/2), (1, dr/2 + 1) ...: scores do not change."""
        if not self.interleaved:
            return weights
        width = self.config.index_head_dim
        order = torch.tensor([*range(0, rope, 2), *range(1, rope, 2), *range(rope, width)])

        def rows(tensor: Tensor) -> Tensor:
            return tensor.view(-1, width, *tensor.shape[1:])[:, order].reshape(tensor.shape)

        return IndexerWeights(
            wq_b=rows(weights.wq_b), wk=rows(weights.wk), k_norm_weight=rows(weights.k_norm_weight),
            k_norm_bias=rows(weights.k_norm_bias), weights_proj=weights.weights_proj,
        )  # fmt: skip
