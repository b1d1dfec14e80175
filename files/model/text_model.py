"""The language model inside a wrapper: a checkpoint whose config.json has a `text_config`, and whose tensors lie under a prefix.

config.json {"model_type": "kimi_k25", "text_config": {...}}   ->  text_config, told as a model's own config.json
language_model.model.layers.0...                                 ->  model.layers.0...         as the hub has them
model.language_model.layers.0...                                 ->  model.layers.0...         as transformers may save them
vision_tower..., mm_projector...                                 ->  none of it: they are carried along as they are
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# What stands before a name of the text model, and what stands there in its own: the way transformers is told of it, too.
PREFIXES = {r"^model\.language_model\.": "model.", r"^language_model\.": ""}
_OTHERS = re.compile(
    r"^(model\.)?(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|mm_projector|vision_projector|patch_merger"
    r"|pre_mm_projector_norm|vision_encoder|vision_language_adapter|image_newline)\b"
)
_SHARED = (
    "quantization_config",
    "compression_config",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "torch_dtype",
    "dtype",
)

# Fields that say how transformers ran the model where it was saved, which says nothing of the model: another class, or another
# machine, may not have that way.
HOW_IT_RUNS = frozenset(
    {"_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation"}
)


def is_wrapper(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config.json is more than its language model."""
    return isinstance(config.get("text_config"), Mapping)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json, with what the whole says of it; all of it where there is no wrapper."""
    if not is_wrapper(config):
        return dict(config)
    inner = dict(config["text_config"])
    return {
        **{name: config[name] for name in _SHARED if config.get(name) is not None and inner.get(name) is None},
        **inner,
    }


def text_names(config: Mapping[str, Any], stored: Iterable[str]) -> dict[str, str]:
    """Stored names by the names that a text model's tensors have of their own; those of other parts are left out."""
    if not is_wrapper(config):
        return {name: name for name in stored}
    return {_without_prefix(name): name for name in stored if not is_other_part(name)}


def is_other_part(name: str) -> bool:
    """Whether a wrapper's tensor is known to be none of the language model."""
    return _OTHERS.match(name) is not None


def stored_module(module: str, stored: Iterable[str]) -> str:
    """What a module of the text model is called in a checkpoint with these tensors: as the layers that it lies among."""
    name = next((it for it in stored if ".layers." in it and not is_other_part(it)), "")
    for pattern, own in PREFIXES.items():
        if found := re.match(pattern, name):
            return found[0] + module.removeprefix(own)
    return module


def _without_prefix(name: str) -> str:
    for pattern, own in PREFIXES.items():
        if re.match(pattern, name):
            return re.sub(pattern, own, name)
    return name
