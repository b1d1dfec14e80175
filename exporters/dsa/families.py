"""The rules: which family of dense MLA models becomes which DSA checkpoint, and by what change of its config and its tensors.

A rule is a record. None is trusted: before a conversion gets its name, the gate of `convert` runs the dense model and the DSA
model and holds them against each other up to index_topk, bit for bit where nothing is folded, to 1e-5 where something is.

Two DSA classes exist that are DeepSeek-V3 plus an indexer, and differ in how the indexer's rotary channels lie (`LAYOUTS`).
What fits neither keeps its own dense config and gets the indexers beside (`OWN`): our graph runs it all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .folds import BiasQuery, Config, Fold, IdentityQuery, PermuteRope, Scale, Untie

Value = Any | Callable[[Config], Any]  # of a field of config.json, or what it is in this config


@dataclass(frozen=True)
class DsaClass:
    """A DSA class of transformers, vLLM, SGLang and others. interleaved: the indexer's rotary channels lie in pairs."""

    model_type: str
    architecture: str
    interleaved: bool


V32 = DsaClass("deepseek_v32", "DeepseekV32ForCausalLM", interleaved=False)
GLM = DsaClass("glm_moe_dsa", "GlmMoeDsaForCausalLM", interleaved=True)
OWN = "own"
LAYOUTS: Mapping[str, DsaClass] = {V32.model_type: V32, GLM.model_type: GLM}


@dataclass(frozen=True)
class Family:
    """How one family is written as a DSA class.

    model_types: what its config.json may say; architectures: likewise, the first one is transformers'. defaults: what the
    family's class takes for a field that is absent, wherever a DSA class takes something else. nulls: what null means to it
    where a DSA class refuses null. config: fields that are written whatever was there. folds: in this order; the query forms
    come first, where there is no query latent. query_forms: of making one where there is none, the best first. readers: the
    targets whose class is what is written, where it is not every DSA class: it is written when these alone are asked for.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    why: str
    defaults: Mapping[str, Value] = field(default_factory=dict)
    nulls: Mapping[str, Value] = field(default_factory=dict)
    config: Mapping[str, Value] = field(default_factory=dict)
    told: Mapping[str, Value] = field(
        default_factory=dict
    )  # true of it, read by other runtimes, left out by transformers
    drops: tuple[str, ...] = ()
    folds: tuple[Fold, ...] = ()
    tied: bool = False  # what an absent tie_word_embeddings means
    unties: bool = False  # a fold needs an lm_head of its own
    query_forms: tuple[str, ...] = ("identity", "bias")
    readers: tuple[str, ...] = ()


# vLLM looks for e_score_correction_bias by the first, SGLang reads it too; both are what the class's router does.
_ROUTER = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
# As (scoring_func, topk_method), DeepSeek-V2's: vLLM's DSA class obeys the two, transformers' reads neither.
SOFTMAX_ROUTERS = (("softmax", "greedy"), ("softmax", "group_limited_greedy"))
_SAME_AS_HEADS = {"num_key_value_heads": lambda config: config.get("num_attention_heads"), "attention_dropout": 0.0}
# No layer has experts: the fields only have to be there for classes that read them.
_ALL_DENSE = {
    "first_k_dense_replace": lambda config: config["num_hidden_layers"], "moe_layer_freq": 1, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "moe_intermediate_size": lambda config: config["intermediate_size"], **_ROUTER,
}  # fmt: skip


def _leading_dense(config: Config) -> int:
    """glm4_moe_lite has no first_k_dense_replace: mlp_layer_types says it, or else the first layer alone is dense."""
    kinds = config.get("mlp_layer_types") or ["dense"]
    return next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))


def _residual(config: Config) -> float:
    """MiniCPM3 multiplies what every half of a layer adds to the residual stream; null means 1."""
    depth = config.get("scale_depth", 1.4)
    return 1.0 if depth is None else float(depth / math.sqrt(config["num_hidden_layers"]))


def _logits(config: Config) -> float:
    """MiniCPM3 divides the last hidden state by hidden_size / dim_model_base before lm_head; null means 1."""
    base = config.get("dim_model_base", 256)
    return 1.0 if base is None else float(base / config["hidden_size"])


def _groups(name: str) -> Callable[[Config], Any]:
    """vLLM's router has groups whatever topk_method says; one group of all experts is none."""
    return lambda config: config.get(name) or 1 if config.get("topk_method") == "group_limited_greedy" else 1


FAMILIES = (
    Family(
        name="deepseek_v3",
        model_types=("deepseek_v3", "kimi_k2", "sarvam_mla"),  # kimi_k2, sarvam_mla: deepseek_v3 under another name
        architectures=("DeepseekV3ForCausalLM", "SarvamMLAForCausalLM"),
        why="DeepSeek-V3.2 is DeepSeek-V3 with indexers: every tensor has the same name and meaning",
        defaults={
            "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
            "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "v_head_dim": 128,
            "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
        },
        nulls={**_SAME_AS_HEADS, "norm_topk_prob": False},
        told=_ROUTER,
        # deepseek_v3 ignores these, the DSA classes obey them: they derive both from first_k_dense_replace when absent
        drops=("mlp_layer_types", "layer_types", "num_experts"),
        folds=(PermuteRope(unless="rope_interleave"),),
    ),
    Family(
        name="glm4_moe_lite",
        model_types=("glm4_moe_lite",),
        architectures=("Glm4MoeLiteForCausalLM",),
        why="GLM-4.7-Flash is DeepSeek-V3 with other sizes; its dense layers are told by first_k_dense_replace",
        defaults={
            "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
            "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20, "n_routed_experts": 64,
            "routed_scaling_factor": 1.8, "q_lora_rank": 768, "v_head_dim": 256, "qk_nope_head_dim": 192, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 4, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5,
        },
        nulls=_SAME_AS_HEADS,
        config={"first_k_dense_replace": _leading_dense},
        told=_ROUTER,
        drops=("mlp_layer_types", "layer_types", "num_experts"),
        folds=(PermuteRope(unless="rope_interleave"),),
    ),
    Family(
        name="youtu",
        model_types=("youtu",),
        architectures=("YoutuForCausalLM",),
        why="Youtu is DeepSeek-V3 without experts",
        defaults={
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 32,
            "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 1536, "v_head_dim": 128,
            "qk_nope_head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "bos_token_id": 128000,
            "eos_token_id": 128001, "tie_word_embeddings": True,
        },
        nulls={**_SAME_AS_HEADS, "v_head_dim": 128, "initializer_range": 0.02},
        config=_ALL_DENSE,
        drops=("mlp_layer_types", "layer_types", "num_experts", "embedding_initializer_range"),
        folds=(PermuteRope(unless="rope_interleave"),),
        tied=True,
    ),
    Family(
        name="minicpm3",
        model_types=("minicpm3",),
        architectures=("MiniCPM3ForCausalLM",),
        why=(
            "MiniCPM3 is DeepSeek-V3 without experts, with factors on embeddings, residuals and logits, which fold into "
            "the weights, and rotates halves; its longrope is kept (vLLM reads any rope but the default as yarn)"
        ),
        defaults={
            "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400, "num_hidden_layers": 62,
            "num_attention_heads": 40, "num_key_value_heads": 40, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
            "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1, "kv_lora_rank": 256, "q_lora_rank": 768,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
            "v_head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
        },
        nulls={**_SAME_AS_HEADS, "v_head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"]},
        config={**_ALL_DENSE, "tie_word_embeddings": False},
        drops=("mlp_layer_types", "layer_types", "num_experts", "scale_emb", "scale_depth", "dim_model_base", "head_dim"),
        folds=(
            PermuteRope(),
            Untie(_logits),
            Scale(r"^model\.embed_tokens\.weight$", lambda config: float(config.get("scale_emb", 12))),
            Scale(r"\.(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)$", _residual),
        ),
        tied=True,
        unties=True,
    ),
    Family(
        name="deepseek_v2",
        model_types=("deepseek_v2",),
        architectures=("DeepseekV2ForCausalLM",),
        why=(
            "in vLLM the class is DeepSeek-V2, too, by scoring_func and topk_method; transformers' class takes a sigmoid whatever "
            "they say, so it cannot load this"
        ),
        defaults={
            "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
            "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": lambda config: config["num_attention_heads"], "n_shared_experts": 2, "n_routed_experts": 64,
            "num_experts_per_tok": None, "routed_scaling_factor": 1.0, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
            "v_head_dim": 128, "first_k_dense_replace": 0, "topk_method": "greedy", "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
        },
        nulls=_SAME_AS_HEADS,
        # transformers' deepseek_v2 does not read norm_topk_prob, vLLM does
        config={"scoring_func": "softmax", "norm_topk_prob": False, "n_group": _groups("n_group"), "topk_group": _groups("topk_group")},
        drops=("mlp_layer_types", "layer_types", "num_experts"),
        query_forms=("identity",),  # biases are transformers' alone
        readers=("vllm",),
    ),
)  # fmt: skip

# Families that no DSA class of transformers fits, and what in them has no place there.
NO_CLASS = {
    "deepseek_v2": "its router takes a softmax, the DSA classes a sigmoid",
    "mistral4": "its router takes a softmax, and it scales queries beyond original_max_position_embeddings",
    "axk1": "its post_mlp_layernorm has no place",
    "longcat_flash": "two attentions a layer, and a shortcut around the experts",
    "kimi_linear": "most of its layers are linear attention",
    "bailing_hybrid": "most of its layers are linear attention, and its MLA has a gate",
}

# No query latent: what makes one, the one that loads everywhere first.
QUERY_FORMS: Mapping[str, Fold] = {"identity": IdentityQuery(), "bias": BiasQuery()}


def base_of(config: Config) -> tuple[str, str]:
    """(model_type, class) of transformers that a DSA class's config.json without the indexers means."""
    softmax = (config.get("scoring_func"), config.get("topk_method")) in SOFTMAX_ROUTERS
    return ("deepseek_v2", "DeepseekV2ForCausalLM") if softmax else ("deepseek_v3", "DeepseekV3ForCausalLM")


def family_of(config: Config) -> Family | None:
    """The rule for a model; None where there is none."""
    model_type = config.get("model_type")
    return next((family for family in FAMILIES if model_type in family.model_types), None)
