"""A config.json that no model has is refused before anything is made as large as it says."""

import time
from pathlib import Path
from typing import Any

import pytest
from places import TINY

from mla2dsa.errors import UserError
from mla2dsa.files.json_files import read_json
from mla2dsa.optimizer.model.config_limits import check_config

FILE = Path("config.json")
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a number of at most 10000"),
    "number-in-quotes": ({"index_topk": "64"}, "index_topk is '64', expected a number"),
    "more-layers-than-tensors": ({"num_hidden_layers": 50}, "num_hidden_layers is 50, but there are no more than 40 tensors"),
    "experts": ({"n_routed_experts": 10**9}, "n_routed_experts is"),
    "experts-of-all-layers": ({"num_hidden_layers": 40, "num_experts": 2**16 - 1}, "more than any model has"),
    "width": ({"hidden_size": 2**40}, "hidden_size is"),
    "rotary": ({"qk_rope_head_dim": 2**33}, "qk_rope_head_dim is"),
    "context": ({"max_position_embeddings": 10**12}, "max_position_embeddings is"),
    "words": ({"vocab_size": 2**60}, "vocab_size is"),
    "digits": ({"vocab_size": 10**4000}, "vocab_size is a number of 13288 bits"),
    "text": ({"kv_lora_rank": "A" * 9999}, "kv_lora_rank is 'AAA"),
    "float": ({"q_lora_rank": 96.0}, "q_lora_rank is 96.0"),
    "infinite": ({"index_topk": float("inf")}, "index_topk is inf"),
    "bool": ({"num_attention_heads": True}, "num_attention_heads is True"),
    "nested": ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is"),
    "nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
    "infinite-inside": ({"text_config": {"rope_theta": float("inf")}}, "rope_theta is inf, expected a finite number"),
    "twice-nested": ({"text_config": {"text_config": {}}}, "text_config has a text_config of its own"),
    "text-config": ({"text_config": [1]}, "text_config is [1], expected an object"),
    "list": ({"architectures": 5}, "architectures is 5, expected a list of names"),
    "list-of-numbers": ({"layer_types": [[]]}, "layer_types is [[]], expected a list of names"),
    "model-type": ({"model_type": ["a"]}, "model_type is ['a'], expected a name"),
    "quantisation": ({"quantization_config": "fp8"}, "quantization_config is fp8, expected an object"),
    "quant-method": ({"quantization_config": {"quant_method": []}}, "quantization_config.quant_method is []"),
    "block": ({"quantization_config": {"weight_block_size": [128]}}, "weight_block_size is [128], expected two numbers"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_model_says(fault: str) -> None:
    change, part = FAULTS[fault]
    started = time.process_time()
    with pytest.raises(UserError) as error:
        check_config(FILE, read_json(TINY / "config.json") | change, 40)
    assert time.process_time() - started < 0.5
    assert str(error.value).startswith("config.json: ")
    assert part in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "change",
    [{}, {"q_lora_rank": None, "quantization_config": None}, {"num_hidden_layers": 61, "n_routed_experts": 384}],
    ids=["as-it-is", "nulls", "kimi-k2"],
)
def test_what_models_say(change: dict[str, Any]) -> None:
    check_config(FILE, read_json(TINY / "config.json") | change, 100)
