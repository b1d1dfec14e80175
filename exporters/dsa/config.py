"""config.json of a DSA checkpoint: the dense one, told in the words of `deepseek_v32`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...errors import UserError

if TYPE_CHECKING:  # it would bring torch, and this is asked before torch is loaded
    from ...kernels.spec import IndexerConfig

DENSE_MODEL_TYPES = ("deepseek_v3", "kimi_k2")  # kimi_k2 is deepseek_v3 under another name
_DENSE_ARCHITECTURE = "DeepseekV3ForCausalLM"
_INDEXER_LINEARS = ("wq_b", "wk", "weights_proj")

# Where a quantisation method lists the modules it leaves alone.
_SKIP_LISTS = {"fp8": "modules_to_not_convert", "compressed-tensors": "ignore"}

# deepseek_v3 ignores these, deepseek_v32 obeys them: it derives both from first_k_dense_replace when they are absent,
# and takes num_experts for n_routed_experts.
_OBEYED_ONLY_BY_V32 = ("mlp_layer_types", "layer_types", "num_experts", "index_topk")

# transformers' default differs between the two (deepseek_v32: 163840), and YaRN may fall back on it.
_V3_MAX_POSITION_EMBEDDINGS = 4096


def can_write(config: Mapping[str, Any]) -> str | None:
    """Why a model with this config.json cannot become a `deepseek_v32` checkpoint, in one line; None if it can."""
    model_type = config.get("model_type")
    if model_type == "deepseek_v32" or config.get("index_topk") is not None:
        return f"model_type {model_type} with index_topk {config.get('index_topk')}: already a DSA model"
    if model_type not in DENSE_MODEL_TYPES:
        known = " and ".join(DENSE_MODEL_TYPES)
        return f"model_type {model_type} cannot be written as deepseek_v32 (its tensors differ); {known} can"
    if (config.get("architectures") or [_DENSE_ARCHITECTURE]) != [_DENSE_ARCHITECTURE]:
        return f"architectures {config['architectures']}: expected {_DENSE_ARCHITECTURE}"
    if config.get("q_lora_rank", 1) is None:
        return "q_lora_rank is null: the deepseek_v32 indexer reads the query latent, and this model has none"
    if not config.get("rope_interleave", True):
        return "rope_interleave is false: deepseek_v32 always rotates MLA's channels in interleaved pairs"
    if "transformers_weights" in config:
        return "transformers_weights names the weight files; rename them to the usual names and drop the field"
    return _quantisation_refusal(config.get("quantization_config"))


def _quantisation_refusal(quantisation: Mapping[str, Any] | None) -> str | None:
    if quantisation is None or quantisation.get("quant_method") in _SKIP_LISTS:
        return None
    known = ", ".join(_SKIP_LISTS)
    return f"quantization_config.quant_method {quantisation.get('quant_method')} is not known here (known: {known})"


def dsa_config(config: Mapping[str, Any], indexer: IndexerConfig, attention_modules: Iterable[str]) -> dict[str, Any]:
    """The config.json of `config`'s model with an indexer in each of `attention_modules` (`model.layers.0.self_attn`).

    transformers reads the result as the same dense model plus indexers. Raises UserError when it cannot (`can_write`),
    or when `indexer` is not deepseek_v32's.
    """
    if reason := can_write(config):
        raise UserError(f"cannot write a DSA checkpoint: {reason}")
    _check_indexer(config, indexer)
    result = {name: value for name, value in config.items() if name not in _OBEYED_ONLY_BY_V32}
    result |= {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "index_n_heads": indexer.index_n_heads,
        "index_head_dim": indexer.index_head_dim,
        "index_topk": indexer.index_topk,
        "indexer_rope_interleave": False,  # runtimes disagree on the default, and the wrong one is silent
    }
    result.setdefault("max_position_embeddings", _V3_MAX_POSITION_EMBEDDINGS)
    _fill_nulls(result)
    _drop_remote_code(result)
    if result.get("quantization_config") is not None:
        result["quantization_config"] = _skip_indexers(result["quantization_config"], attention_modules)
    return result


def _check_indexer(config: Mapping[str, Any], indexer: IndexerConfig) -> None:
    if indexer.rope_interleave:
        raise UserError("rope_interleave of the indexer is true; deepseek_v32 rotates its indexer half-split")
    rope = config.get("qk_rope_head_dim", 64)
    if indexer.index_head_dim < rope:
        raise UserError(f"index_head_dim {indexer.index_head_dim} is smaller than qk_rope_head_dim {rope}")
    if min(indexer.index_topk, indexer.index_n_heads) < 1:
        raise UserError(f"index_topk {indexer.index_topk} and index_n_heads {indexer.index_n_heads} must be positive")


def _fill_nulls(result: dict[str, Any]) -> None:
    """deepseek_v3 gives null a meaning where deepseek_v32 refuses it."""
    meaning = {
        "num_key_value_heads": result.get("num_attention_heads"),
        "attention_dropout": 0.0,
        "norm_topk_prob": False,
    }
    result.update({name: value for name, value in meaning.items() if name in result and result[name] is None})


def _drop_remote_code(result: dict[str, Any]) -> None:
    """Remote code would load the dense class, indexers ignored; a tokenizer's own code stays."""
    remote = result.pop("auto_map", None) or {}
    if kept := {name: code for name, code in remote.items() if not name.startswith(("AutoConfig", "AutoModel"))}:
        result["auto_map"] = kept


def _skip_indexers(quantisation: Mapping[str, Any], attention_modules: Iterable[str]) -> dict[str, Any]:
    """List the new linears, by full name, among those that are not quantised."""
    field = _SKIP_LISTS[quantisation["quant_method"]]
    skipped = quantisation.get(field)
    if skipped is None:
        # Without a list, transformers leaves lm_head alone by itself; with one, only what the list names.
        skipped = ["lm_head"] if field == "modules_to_not_convert" else []
    linears = [f"{module}.indexer.{linear}" for module in attention_modules for linear in _INDEXER_LINEARS]
    return {**quantisation, field: [*skipped, *linears]}
