"""What a lightning indexer is made of: its sizes and its five tensors per layer.

Names, shapes and layout are those of the DeepSeek-V3.2 checkpoint (`model.layers.{i}.self_attn.indexer.*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

K_NORM_EPS = 1e-6  # the indexer's LayerNorm epsilon, whatever the model's rms_norm_eps is


@dataclass(frozen=True)
class IndexerConfig:
    """Sizes of the indexer, the same for every layer, and which layers have one.

    index_topk: past tokens each query attends to.
    index_n_heads: query heads of the indexer (HI).
    index_head_dim: width of a head and of the one shared key (dI).
    rope_interleave: False is DeepSeek-V3.2's half-split rotary layout on the first `qk_rope_head_dim` channels.
    shared: numbers of the layers without an indexer, which attend to what the last layer before them selected (GLM-5.2).
    """

    index_topk: int
    index_n_heads: int
    index_head_dim: int = 128
    rope_interleave: bool = False
    shared: tuple[int, ...] = ()


@dataclass(frozen=True)
class IndexerWeights:
    """One layer's indexer.

    wq_b: [HI * dI, q_lora_rank]; wk: [dI, hidden_size]; k_norm_weight, k_norm_bias: [dI] (LayerNorm with bias);
    weights_proj: [HI, hidden_size]. Rotary channels come first in a head.
    """

    wq_b: Tensor
    wk: Tensor
    k_norm_weight: Tensor
    k_norm_bias: Tensor
    weights_proj: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their checkpoint names, relative to `...self_attn.indexer.`."""
        return {name: getattr(self, field) for field, name in INDEXER_TENSORS.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> IndexerWeights:
        """Inverse of `tensors`. Raises KeyError on a missing name."""
        return cls(**{field: tensors[name] for field, name in INDEXER_TENSORS.items()})

    @staticmethod
    def shapes(config: IndexerConfig, hidden_size: int, q_width: int) -> dict[str, tuple[int, ...]]:
        """Expected shape of each tensor by checkpoint name; `q_width` is q_lora_rank (hidden_size without q latent)."""
        heads, dim = config.index_n_heads, config.index_head_dim
        return {
            "wq_b.weight": (heads * dim, q_width),
            "wk.weight": (dim, hidden_size),
            "k_norm.weight": (dim,),
            "k_norm.bias": (dim,),
            "weights_proj.weight": (heads, hidden_size),
        }


INDEXER_TENSORS = {
    "wq_b": "wq_b.weight",
    "wk": "wk.weight",
    "k_norm_weight": "k_norm.weight",
    "k_norm_bias": "k_norm.bias",
    "weights_proj": "weights_proj.weight",
}
