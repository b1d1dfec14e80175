"""Limits on what a config.json may say: a number that no model has would take hours or all memory before it turned out wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError, short

_WIDTH, _HEADS = 2**24, 2**16
LARGEST = {
    "num_hidden_layers": 10_000,
    "n_routed_experts": _HEADS,
    "num_experts": _HEADS,
    "num_local_experts": _HEADS,
    "n_shared_experts": _HEADS,
    "num_experts_per_tok": _HEADS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "qk_nope_head_dim": _HEADS,
    "qk_rope_head_dim": _HEADS,
    "v_head_dim": _HEADS,
    "head_dim": _HEADS,
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "moe_intermediate_size": _WIDTH,
    "q_lora_rank": _WIDTH,
    "kv_lora_rank": _WIDTH,
    "vocab_size": 2**28,
    "max_position_embeddings": 2**31 - 1,
    "index_topk": 2**31 - 1,
    "index_n_heads": _HEADS,
    "index_head_dim": _HEADS,
    "first_k_dense_replace": 10_000,
    "num_nextn_predict_layers": 10_000,
}
_LISTS = ("architectures", "mlp_layer_types", "layer_types", "indexer_types")
_OBJECTS = ("auto_map", "quantization_config", "rope_scaling", "rope_parameters", "text_config")
_MOST_EXPERTS = 1_000_000  # of all layers together


def check_config(file: Path, config: Mapping[str, Any], tensors: int) -> None:
    """tensors: how many the checkpoint holds; each layer has some. Raises UserError naming the field."""
    parts = [config, *(part for part in (config.get("text_config"),) if isinstance(part, Mapping))]
    for part in parts:
        for name, largest in LARGEST.items():
            value = part.get(name)
            if value is not None and (type(value) is not int or value > largest):
                told = short(value if isinstance(value, int) else repr(value))  # "64" is no number
                raise UserError(f"{file}: {name} is {told}, expected a number of at most {largest}")
        for name in _LISTS:
            value = part.get(name)
            if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                raise UserError(f"{file}: {name} is {short(value)}, expected a list of names")
        for name in _OBJECTS:
            if not isinstance(part.get(name, {}), dict | type(None)):
                raise UserError(f"{file}: {name} is {short(part[name])}, expected an object")
        for name, value in part.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{file}: {name} is {value}, expected a finite number")
        _check_counts(file, part, tensors)
    if len(parts) > 1 and parts[1].get("text_config") is not None:
        raise UserError(f"{file}: text_config has a text_config of its own, expected the config of a text model")
    _check_quantisation(file, config.get("quantization_config") or {})
    if not isinstance(config.get("model_type", ""), str):
        raise UserError(f"{file}: model_type is {short(config['model_type'])}, expected a name")


def _check_quantisation(file: Path, quantisation: Mapping[str, Any]) -> None:
    for name in ("quant_method", "fmt"):
        if not isinstance(quantisation.get(name), str | type(None)):
            raise UserError(f"{file}: quantization_config.{name} is {short(quantisation[name])}, expected a name")
    match quantisation.get("weight_block_size"):
        case None | [int(), int()]:
            return
        case size:
            raise UserError(f"{file}: quantization_config.weight_block_size is {short(size)}, expected two numbers")


def _check_counts(file: Path, part: Mapping[str, Any], tensors: int) -> None:
    layers = part.get("num_hidden_layers") or 0
    if layers > tensors:
        raise UserError(f"{file}: num_hidden_layers is {layers}, but there are no more than {tensors} tensors")
    experts = max(part.get(name) or 0 for name in ("n_routed_experts", "num_experts", "num_local_experts"))
    if layers * experts > _MOST_EXPERTS:
        raise UserError(f"{file}: {layers} layers of {experts} experts each, more than any model has")
