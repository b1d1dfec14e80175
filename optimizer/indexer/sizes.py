"""Sizes of the indexers: those that a recipe leaves open, and what is wrong with those that it asks for. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..model.config_limits import LARGEST

DEFAULT_TOPK = 2048  # fixed by DeepSeek-V3.2's config.json: index_topk
MAX_HEADS = 64  # fixed by DeepSeek-V3.2's config.json: index_n_heads
HEAD_DIM = 128  # fixed by DeepSeek-V3.2's config.json: index_head_dim
MEASURED = (
    2  # fixed by what is measured past index_topk: a token whose selection leaves one out, and the one it predicts
)
CLOSED_FORM_CHANNELS = (
    2  # fixed by the closed form: an index head has a balance and a latent channel beside the rotary ones
)
Sizes = tuple[int, int, int]


class Asked(Protocol):
    """The sizes in a recipe; None leaves one open."""

    @property
    def index_topk(self) -> int | None: ...
    @property
    def index_n_heads(self) -> int | None: ...
    @property
    def index_head_dim(self) -> int | None: ...
    @property
    def sequence_length(self) -> int | None: ...


def indexer_sizes(recipe: Asked, config: Mapping[str, Any], donor: Sizes | None = None) -> Sizes:
    """(index_topk, index_n_heads, index_head_dim): asked for, or the donor's, else heads as many as the model's (at most 64) of
    width 128. config: the model's config.json."""
    topk, heads, width = donor or (
        DEFAULT_TOPK,
        min(MAX_HEADS, _number(config, "num_attention_heads") or MAX_HEADS),
        HEAD_DIM,
    )
    return recipe.index_topk or topk, recipe.index_n_heads or heads, recipe.index_head_dim or width


def size_faults(recipe: Asked, config: Mapping[str, Any], context: int | None, donor: Sizes | None = None) -> list[str]:
    """What does not fit, a line each. context: None where only the model's class knows it."""
    topk, heads, width = indexer_sizes(recipe, config, donor)
    faults = [
        f"{name} {size}, expected at most {LARGEST[name]}; pass a smaller --{name.replace('_', '-')}"
        for name, size in (("index_n_heads", heads), ("index_head_dim", width))
        if size > LARGEST[name]  # or config.json would say what is not read
    ]
    if context is not None and context <= MEASURED:
        faults.append(
            f"the model's context is {context} tokens, which leaves nothing sparse; mend max_position_embeddings in config.json"
        )
    elif context is not None and topk > context - MEASURED:
        faults.append(
            f"index_topk {topk} leaves nothing sparse in the model's context of {context} tokens; "
            f"pass --index-topk, at most {context - MEASURED}"
        )
    elif recipe.sequence_length and (fault := length_fault(recipe.sequence_length, topk, context)):
        faults.append(fault)
    rope = _number(config, "qk_rope_head_dim") or 0
    if donor is not None and (heads, width) != donor[1:]:
        faults.append(
            f"the donor's indexer has {donor[1]} heads of {donor[2]}, {heads} of {width} were asked for; "
            "leave index_n_heads and index_head_dim to the donor"
        )
    elif donor is None and width < rope + CLOSED_FORM_CHANNELS:
        faults.append(
            f"index_head_dim {width}, expected at least {rope + CLOSED_FORM_CHANNELS} (qk_rope_head_dim {rope}, a balance "
            "channel and a latent channel); pass a larger --index-head-dim"
        )
    return faults


def length_fault(length: int, topk: int, context: int | None) -> str | None:
    """What is wrong with sequences of this length."""
    if topk + 1 < length and (context is None or length <= context):
        return None
    return (
        f"sequence_length {length}, expected at least {topk + 2} (index_topk and two) and at most the context of "
        f"{context or 'the model'} tokens"
    )


def parameters(sizes: Sizes, config: Mapping[str, Any]) -> int:
    """Of one layer's indexer, but for its norm; 0 where config.json does not say."""
    _, heads, width = sizes
    hidden = _number(config, "hidden_size") or 0
    q_width = _number(config, "q_lora_rank") or hidden
    return heads * width * q_width + width * hidden + heads * hidden


def _number(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) else None
