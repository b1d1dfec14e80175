"""Each private name of transformers: it is there, it does what we use it for, and one line says so when it is gone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import families
import pytest
import torch
from forgetting import complaint, forget

from mla2dsa.compat import transformers_private as private
from mla2dsa.compat.private_names import MovedError
from mla2dsa.compat.transformers_private import TRANSFORMERS


def ours(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError


def register() -> None:
    private.register("mla2dsa_test", ours, ours, ours)


def choose() -> None:
    config = families.config("deepseek_v3")
    register()
    private.choose(config, "mla2dsa_test", "mla2dsa_test")
    assert (config._attn_implementation, config._experts_implementation) == ("mla2dsa_test", "mla2dsa_test")


@cache
def model() -> Any:
    return families.build("deepseek_v3")


def unusual_experts() -> list[str]:
    return private.unusual_experts(model().model.layers[1].mlp.experts)


def is_plain_causal() -> None:
    from transformers.masking_utils import causal_mask_function, sliding_window_overlay

    assert private.is_plain_causal(causal_mask_function)
    assert not private.is_plain_causal(sliding_window_overlay(4))


def explicit_mask() -> None:
    from transformers.masking_utils import causal_mask_function

    mask = private.explicit_mask(1, 3, 3, causal_mask_function)
    assert mask is not None
    assert torch.equal(mask[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())


def class_name() -> None:
    assert private.causal_lm_class_name("deepseek_v3") == "DeepseekV3ForCausalLM"
    assert private.causal_lm_class_name("no_such_type") is None


def initialise() -> None:
    rotary = model().model.rotary_emb
    before = rotary.inv_freq.clone()
    rotary.inv_freq.fill_(torch.nan)
    private.initialise(model(), rotary)
    assert torch.equal(rotary.inv_freq, before)


def longcat() -> None:
    from transformers.models.longcat_flash import modeling_longcat_flash

    with private.longcat_experts(ours):
        assert modeling_longcat_flash.LongcatFlashExperts.forward is ours
    assert modeling_longcat_flash.LongcatFlashExperts.forward is not ours


def delta_attention(model_type: str) -> None:
    with private.delta_attention(model_type, ours):
        module = sys.modules[f"transformers.models.{model_type}.modeling_{model_type}"]
        assert module.chunk_kimi_delta_attention is ours
    assert module.chunk_kimi_delta_attention is not ours


def naming() -> None:
    """Its experts, and a renaming that every model has."""
    found = private.naming_of(model())
    joins = {join.target: (join.sources, join.steps) for join in found.joins}
    gate_up = ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight")
    assert joins["mlp.experts.gate_up_proj"] == (gate_up, ("MergeModulelist", "Concatenate"))
    assert joins["mlp.experts.down_proj"] == (("mlp.experts.*.down_proj.weight",), ("MergeModulelist",))
    assert found.renamed("a.LayerNorm.gamma") == "a.LayerNorm.weight"


CALLS: dict[str, Callable[[], Any]] = {
    "transformers.conversion_mapping:get_model_conversion_mapping": naming,
    "transformers.core_model_loading:WeightConverter": naming,
    "transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS": register,
    "transformers.integrations.moe:_default_apply_gate": unusual_experts,
    "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS": register,
    "transformers.masking_utils:causal_mask_function": is_plain_causal,
    "transformers.masking_utils:sdpa_mask": explicit_mask,
    "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS": register,
    "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": class_name,
    **{
        f"transformers.models.{kind}.modeling_{kind}:chunk_kimi_delta_attention": partial(delta_attention, kind)
        for kind in private.DELTA_ATTENTION
    },
    "transformers.models.longcat_flash.modeling_longcat_flash:LongcatFlashExperts": longcat,
    "Experts._apply_gate": unusual_experts,
    "Experts.has_bias": unusual_experts,
    "Experts.has_gate": unusual_experts,
    "Experts.has_post_expert_norm": unusual_experts,
    "Experts.is_concatenated": unusual_experts,
    "Experts.is_transposed": unusual_experts,
    "PreTrainedConfig._attn_implementation": choose,
    "PreTrainedConfig._experts_implementation": choose,
    "PreTrainedModel._init_weights": initialise,
    "WeightTransform.operations": naming,
    "WeightTransform.rename_source_key": naming,
    "WeightTransform.source_patterns": naming,
    "WeightTransform.target_patterns": naming,
}
LISTED = [*TRANSFORMERS.names, *TRANSFORMERS.attributes]


@pytest.mark.parametrize("name", LISTED)
def test_name_is_there(name: str) -> None:
    assert not CALLS[name]()  # experts of DeepSeek-V3 are the usual ones; the others assert themselves


@pytest.mark.parametrize("name", LISTED)
def test_a_name_that_is_gone_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model()
    forget(monkeypatch, name)
    with pytest.raises(MovedError, match=complaint(TRANSFORMERS, name)):
        CALLS[name]()


def test_every_call_is_of_a_listed_name() -> None:
    assert CALLS.keys() == set(LISTED)


def test_a_registered_implementation_is_found() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    register()
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS):
        assert registry["mla2dsa_test"] is ours


def test_experts_with_a_gate_of_their_own_are_unusual(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = model().model.layers[1].mlp.experts
    monkeypatch.setattr(type(experts), "_apply_gate", ours)
    assert unusual_experts() == ["a gate of their own"]
