"""config.json of a DSA checkpoint: the dense one, told in the words of a DSA class, or its own with the indexer's sizes added.

In the own layout the sizes stand in config.json, too, for it is the truth about the model: the dense class of transformers takes
fields it does not know and ignores them, and vLLM's deepseek_v2 family looks for index_topk in just this way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import UserError
from ...files.model.text_model import HOW_IT_RUNS, is_wrapper, text_config
from .folds import Config, bias_rank
from .layout import SKIP_LISTS, Layout, with_defaults

if TYPE_CHECKING:  # it would bring torch, and this is asked before torch is loaded
    from ...kernels.spec import IndexerConfig

_INDEXER_LINEARS = ("wq_b", "wk", "weights_proj")
# In the own layout, which no other class reads: numbers of the attentions, in the order they are run, without an indexer.
SHARED_FIELD = "index_shared_layers"
# Of glm_moe_dsa, and what vLLM and SGLang know beside: which layers have an indexer. The first that is set counts.
SHARING_FIELDS = ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
_OBEYED_ONLY_BY_DSA = ("index_topk",)


class DsaSizes(Protocol):
    """Sizes of the indexers."""

    @property
    def index_topk(self) -> int: ...
    @property
    def index_n_heads(self) -> int: ...
    @property
    def index_head_dim(self) -> int: ...
    @property
    def shared(self) -> tuple[int, ...]: ...


def words_of(config: Config, layout: Layout, sizes: DsaSizes | None, mtp_layers: int = 0) -> dict[str, Any]:
    """The text model's part of the config.json that `dsa_config` will write, as far as a quantisation is not concerned; sizes:
    of the indexers, None where they do not matter."""
    result = _in_words_of_a_class(config, layout) if layout.family else dict(config)
    if "num_nextn_predict_layers" in config or mtp_layers:
        result["num_nextn_predict_layers"] = mtp_layers
    if sizes is not None:
        _add_indexer(result, sizes, layout)
    return result


def dsa_config(
    config: Config, indexer: IndexerConfig, attention_modules: Iterable[str], layout: Layout, mtp_layers: int = 0,
    plain: Iterable[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The config.json of `config`'s model in `layout`, with an indexer in each of `attention_modules` (`model.layers.0.self_attn`).

    transformers reads the result as the same dense model plus indexers (in the own layout: as the dense model). mtp_layers: how
    many multi-token-prediction layers are stored in it. plain: modules beside the indexers whose weights are not quantised, though
    others of their kind may be. Raises UserError when `indexer` does not fit.
    """
    _check_indexer(config, indexer)
    result = _in_words_of_a_class(config, layout) if layout.family else dict(config)
    if layout.family and ("num_nextn_predict_layers" in config or mtp_layers):
        result["num_nextn_predict_layers"] = mtp_layers
    _drop_remote_code(result)
    if not is_wrapper(config):
        _tell(result, indexer, layout, attention_modules, plain)
        return result
    inner = dict(result["text_config"])
    _drop_remote_code(inner)
    _tell(inner, indexer, layout, attention_modules, plain)
    if result.get("quantization_config") is not None:
        result["quantization_config"] = _skip_indexers(result["quantization_config"], attention_modules, plain)
    return {**result, "text_config": inner}


def _tell(
    text: dict[str, Any], indexer: IndexerConfig, layout: Layout, attention_modules: Iterable[str], plain: Iterable[str]
) -> None:
    """What is new, in the part of config.json that is about the text model."""
    if not layout.family and layout.mtp == "drop" and "num_nextn_predict_layers" in text:
        text["num_nextn_predict_layers"] = 0
    _add_indexer(text, indexer, layout)
    if text.get("quantization_config") is not None:
        text["quantization_config"] = _skip_indexers(text["quantization_config"], attention_modules, plain)


def _in_words_of_a_class(config: Config, layout: Layout) -> dict[str, Any]:
    family, target = layout.family, layout.target
    assert family is not None
    assert target is not None
    dropped = {*family.drops, *_OBEYED_ONLY_BY_DSA, *HOW_IT_RUNS}
    full = with_defaults(config, family)
    result = {name: value for name, value in full.items() if name not in dropped}
    result |= {name: value(full) if callable(value) else value for name, value in family.config.items()}
    result = {**family.told, **result, "model_type": target.model_type, "architectures": [target.architecture]}
    if not result.get("rope_interleave", True):
        del result["rope_interleave"]  # folded
    if layout.untie:
        result["tie_word_embeddings"] = False
    if layout.forms:
        result |= _query_form(layout.forms[0], full)
    return result


def _query_form(form: str, full: Config) -> dict[str, Any]:
    width = full["hidden_size"]
    return {"q_lora_rank": width} if form == "identity" else {"q_lora_rank": bias_rank(width), "attention_bias": True}


def _add_indexer(result: dict[str, Any], indexer: DsaSizes, layout: Layout) -> None:
    for name in (*SHARING_FIELDS, SHARED_FIELD):  # a dense model may have them, and they mean nothing there
        result.pop(name, None)
    interleaved = layout.target is not None and layout.target.interleaved
    result |= {
        "index_n_heads": indexer.index_n_heads,
        "index_head_dim": indexer.index_head_dim,
        "index_topk": indexer.index_topk,
        "indexer_rope_interleave": interleaved,  # runtimes disagree on the default, and the wrong one is silent
    }
    if indexer.shared and layout.target is None:
        result[SHARED_FIELD] = list(indexer.shared)
    elif indexer.shared:  # transformers reads the one, vLLM and SGLang the other
        layers = result.get("num_hidden_layers")
        if type(layers) is not int:
            raise UserError(f"config.json: num_hidden_layers is {layers!r}, expected how many layers there are")
        kinds = ["shared" if layer in indexer.shared else "full" for layer in range(layers)]
        result |= {"indexer_types": kinds, "index_topk_pattern": "".join(kind[0].upper() for kind in kinds)}


def _check_indexer(config: Config, indexer: IndexerConfig) -> None:
    if indexer.rope_interleave:
        raise UserError(
            "rope_interleave of the indexer is true, expected half-split weights, whatever layout is written"
        )
    rope = text_config(config).get("qk_rope_head_dim", 64)
    if indexer.index_head_dim < rope:
        raise UserError(f"index_head_dim {indexer.index_head_dim} is smaller than qk_rope_head_dim {rope}")
    if min(indexer.index_topk, indexer.index_n_heads) < 1:
        raise UserError(f"index_topk {indexer.index_topk} and index_n_heads {indexer.index_n_heads} must be positive")


def _drop_remote_code(result: dict[str, Any]) -> None:
    """Remote code would load the dense class, indexers ignored; a tokenizer's own code stays."""
    remote = result.pop("auto_map", None) or {}
    if kept := {name: code for name, code in remote.items() if not name.startswith(("AutoConfig", "AutoModel"))}:
        result["auto_map"] = kept


def _skip_indexers(
    quantisation: Mapping[str, Any], attention_modules: Iterable[str], plain: Iterable[str]
) -> dict[str, Any]:
    """List the new linears, by full name, among those that are not quantised."""
    field = SKIP_LISTS[quantisation["quant_method"]]
    skipped = quantisation.get(field)
    if skipped is None:
        # Without a list, transformers leaves lm_head alone by itself; with one, only what the list names.
        skipped = ["lm_head"] if field == "modules_to_not_convert" else []
    linears = [f"{module}.indexer.{linear}" for module in attention_modules for linear in _INDEXER_LINEARS]
    return {**quantisation, field: [*skipped, *linears, *(name for name in plain if name not in skipped)]}
