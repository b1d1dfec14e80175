"""config.json of a DSA checkpoint: transformers has to read the same dense model out of it."""

import dataclasses
from typing import Any

import pytest
from checkpoints import INDEXER

from mla2dsa.errors import UserError
from mla2dsa.exporters.dsa.config import dsa_config as written
from mla2dsa.exporters.dsa.layout import can_write, choose
from mla2dsa.kernels.spec import IndexerConfig

# DeepSeek-V3's config.json as published, in the old spelling of rotary settings and with remote code.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
}


def dsa_config(config: dict[str, Any], indexer: IndexerConfig, modules: list[str]) -> dict[str, Any]:
    """In the words of the class that fits."""
    return written(config, indexer, modules, choose(config, {}), mtp_layers=1)


MODULES = [f"model.layers.{layer}.self_attn" for layer in range(61)]
OFFICIAL = IndexerConfig(index_topk=2048, index_n_heads=64)


def read_as(model_type: str, config: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{name: value for name, value in config.items() if name != "model_type"})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": None},
        {"mlp_layer_types": ["sparse"] * 61, "layer_types": ["full_attention"] * 61},
        {"first_k_dense_replace": 1, "n_routed_experts": 384, "num_experts": 5, "model_type": "kimi_k2"},
        {"num_key_value_heads": None, "num_attention_heads": 64, "attention_dropout": None, "norm_topk_prob": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}, "rope_scaling": None},
    ],
    ids=["v3", "no-yarn", "layer-types", "kimi", "nulls", "new-rope"],
)
def test_transformers_reads_the_same_model(changes: dict[str, Any]) -> None:
    source = {**V3, **changes}
    dense = read_as("deepseek_v3", source)
    dsa = read_as("deepseek_v32", dsa_config(source, OFFICIAL, MODULES))
    own = {"model_type", "architectures", "quantization_config", "auto_map", "index_topk", "layer_types"}
    ignored = {"num_experts", "mlp_layer_types"}  # what deepseek_v3 does not act upon
    fields = {field.name for field in dataclasses.fields(dense)} | {field.name for field in dataclasses.fields(dsa)}
    shared = [name for name in fields - own - ignored if hasattr(dense, name) and hasattr(dsa, name)]
    assert len(shared) > 40
    null = {"attention_dropout": 0.0, "norm_topk_prob": False}  # how deepseek_v3 acts upon null
    expected = {name: getattr(dense, name) for name in shared}
    expected |= {name: value for name, value in null.items() if expected[name] is None}
    assert {name: getattr(dsa, name) for name in shared} == expected
    sparse = [layer >= dense.first_k_dense_replace for layer in range(dense.num_hidden_layers)]
    assert [kind == "sparse" for kind in dsa.mlp_layer_types] == sparse
    assert set(dsa.layer_types) == {"indexed_attention"}
    assert (dsa.index_topk, dsa.index_n_heads, dsa.index_head_dim) == (2048, 64, 128)


def test_written_fields() -> None:
    result = dsa_config(V3, OFFICIAL, MODULES)
    assert result["architectures"] == ["DeepseekV32ForCausalLM"]
    assert result["model_type"] == "deepseek_v32"
    assert result["indexer_rope_interleave"] is False
    assert "auto_map" not in result
    same = set(V3) - {"architectures", "model_type", "auto_map", "quantization_config"}
    assert all(result[name] == V3[name] for name in same)


def test_tokenizer_code_stays() -> None:
    config = {**V3, "auto_map": {**V3["auto_map"], "AutoTokenizer": ["tokenization.Tok", None]}}
    assert dsa_config(config, OFFICIAL, MODULES)["auto_map"] == {"AutoTokenizer": ["tokenization.Tok", None]}


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in-a-wrapper"])
def test_what_a_dense_model_says_of_sharing_is_not_passed_on(wrapped: bool) -> None:
    said = {
        "indexer_types": ["shared"] * 61,
        "index_topk_pattern": "S",
        "index_topk_freq": 2,
        "index_shared_layers": [1],
    }
    text = {**V3, **said, "quantization_config": None}
    config = {"model_type": "kimi_k25", "text_config": text} if wrapped else text
    result = written(config, OFFICIAL, MODULES, choose(config, {}, "own"))
    inner = result["text_config"] if wrapped else result
    assert not said.keys() & inner.keys()
    assert inner["index_topk"] == OFFICIAL.index_topk


def test_how_the_dense_model_ran_is_not_passed_on() -> None:
    """transformers' DSA classes have no flash attention, and would refuse to be loaded."""
    config = {**V3, "_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2"}
    assert dsa_config(config, OFFICIAL, MODULES) == dsa_config(V3, OFFICIAL, MODULES)


@pytest.mark.parametrize("skipped", [None, ["lm_head", "model.layers.0.mlp.gate"]], ids=["no-list", "list"])
def test_fp8_leaves_the_indexers_alone(skipped: list[str] | None) -> None:
    """By transformers' own rule for names; without a list it spares lm_head by itself, with one only what it names."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    quantisation = {**V3["quantization_config"], **({"modules_to_not_convert": skipped} if skipped else {})}
    result = dsa_config({**V3, "quantization_config": quantisation}, OFFICIAL, MODULES)["quantization_config"]
    patterns = result["modules_to_not_convert"]
    for layer in (0, 1, 10, 60):
        attention = f"model.layers.{layer}.self_attn"
        assert should_convert_module(f"{attention}.q_b_proj", patterns)
        assert should_convert_module(f"{attention}.kv_b_proj", patterns)
        for linear in ("wq_b", "wk", "weights_proj"):
            assert not should_convert_module(f"{attention}.indexer.{linear}", patterns)
    assert not should_convert_module("lm_head", patterns)
    assert {name: result[name] for name in V3["quantization_config"]} == V3["quantization_config"]
    assert set(skipped or []) <= set(patterns)
    assert "modules_to_not_convert" not in V3["quantization_config"]


def test_compressed_tensors_ignore() -> None:
    quantisation = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {}}
    result = dsa_config({**V3, "quantization_config": quantisation}, OFFICIAL, MODULES[:1])
    linears = [f"model.layers.0.self_attn.indexer.{name}" for name in ("wq_b", "wk", "weights_proj")]
    assert result["quantization_config"] == {**quantisation, "ignore": ["lm_head", *linears]}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "deepseek_v32", "index_topk": 2048}, "already a DSA model"),
        ({"index_topk": 2048}, "already a DSA model"),
        ({"architectures": ["DeepseekV3ForSequenceClassification"]}, "expected DeepseekV3ForCausalLM"),
        ({"transformers_weights": "x.safetensors"}, "transformers_weights"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method awq"),
    ],
)
def test_can_write_says_why_not(changes: dict[str, Any], part: str) -> None:
    reason = can_write({**V3, **changes})
    assert reason is not None
    assert part in reason
    assert len(reason.splitlines()) == 1
    with pytest.raises(UserError, match="no DSA checkpoint can be written"):
        dsa_config({**V3, **changes}, OFFICIAL, MODULES)


@pytest.mark.parametrize("changes", [{}, {"model_type": "kimi_k2"}, {"quantization_config": None}])
def test_can_write(changes: dict[str, Any]) -> None:
    assert can_write({**V3, **changes}) is None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rope_interleave": True}, "half-split"),
        ({"index_head_dim": 32}, "smaller than qk_rope_head_dim 64"),
        ({"index_topk": 0}, "must be positive"),
    ],
)
def test_indexer_that_v32_has_no_words_for(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        dsa_config(V3, dataclasses.replace(INDEXER, **{"index_head_dim": 64, **changes}), MODULES)
