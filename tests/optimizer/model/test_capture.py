"""Capture: from config.json alone to a graph that computes what transformers' model computes."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from comparing import close
from safetensors.torch import load_file, save_file
from saved import captured, config_dict, opened, run, saved, tensors, transformers_model
from torch import Tensor
from torch._subclasses import FakeTensor

from mla2dsa.compat import transformers_private
from mla2dsa.errors import UserError
from mla2dsa.optimizer.model import hf_interfaces
from mla2dsa.optimizer.model.capture import ATTENTION, Capture, capture, read_config
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.model.weights import WeightSource

FAMILIES = ("deepseek_v3", "deepseek_v3-halfsplit", "deepseek_v2", "deepseek_v2-lite", "longcat_flash", "glm4_moe_lite",
            "minicpm3", "mistral4", "youtu")  # fmt: skip
SHAPES = [(1, 1, 0), (1, 9, 0), (3, 2, 0), (2, 33, 5)]  # batch, length, left padding of the first row


# From config.json alone


@pytest.mark.parametrize("name", FAMILIES)
def test_config_alone_gives_names_and_shapes_without_a_weight(name: str) -> None:
    made = captured(config_dict(name))
    model = families.build(name, device="meta")
    assert made.shapes == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert all(tensor.is_meta for tensor in made.program.state_dict.values())


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "mistral4", "longcat_flash"])
def test_computed_buffers_are_real_and_transformers_own(name: str) -> None:
    constants = captured(config_dict(name)).program.constants
    buffers = dict(families.build(name).named_buffers())
    found = [n for n, value in constants.items() if isinstance(value, Tensor) and n in buffers]
    assert any("inv_freq" in n for n in found)
    for n in found:
        assert not isinstance(constants[n], FakeTensor)
        assert torch.equal(constants[n], buffers[n])


def test_deepseek_v3_sized_layers_take_no_memory() -> None:
    """Two of DeepSeek-V3's layers, one with its 256 experts, would be 50 GB in float32."""
    big = {
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "vocab_size": 129280,
    }  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = capture(config_dict("deepseek_v3", **big))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20  # Linux counts in KiB
    assert made.shapes["model.layers.1.mlp.experts.gate_up_proj"] == (256, 4096, 7168)
    assert grown < 1.0


def test_the_graph_keeps_no_fake_tensor_inputs() -> None:
    assert captured(config_dict("youtu")).program.example_inputs is None


@pytest.mark.parametrize("name", ["youtu", "minicpm3"])
def test_tied_embeddings_are_told(name: str) -> None:
    assert captured(config_dict(name)).tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_untied_embeddings() -> None:
    assert captured(config_dict("deepseek_v3")).tied == {}


def test_max_length_is_the_models_context() -> None:
    assert captured(config_dict("deepseek_v3")).max_length == families.MAX_LENGTH


def test_the_same_config_gives_the_same_graph() -> None:
    config = config_dict("minicpm3")
    first, second = captured(config).program.graph, capture(config).program.graph
    assert [n.name for n in first.nodes] == [n.name for n in second.nodes]


def test_a_quantised_checkpoint_has_the_graph_of_the_dequantised_model() -> None:
    config = config_dict("minicpm3")
    quantised = {**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert capture(quantised).shapes == captured(config).shapes


def test_bfloat16_weights_and_float32_rotary_frequencies() -> None:
    made = capture(config_dict("minicpm3"), dtype=torch.bfloat16)
    assert {t.dtype for t in made.program.state_dict.values()} == {torch.bfloat16}
    frequencies = [t for n, t in made.program.constants.items() if "inv_freq" in n and isinstance(t, Tensor)]
    assert frequencies
    assert all(t.dtype == torch.float32 for t in frequencies)


# The graph is transformers' model


@pytest.mark.parametrize("name", FAMILIES)
def test_graph_with_the_checkpoints_weights_is_transformers_model(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """transformers loads the weights by itself and runs its own experts and attention."""
    folder = saved(name, tmp_path_factory)
    source, model = opened(folder), transformers_model(folder)
    for batch, length, padding in SHAPES:
        inputs = families.inputs(batch, length, padding)
        keep = inputs["attention_mask"].bool()
        close(run(source, tensors(inputs))[keep], families.logits(model, inputs), of_max=1e-6)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("batch", "length", "padding"), SHAPES, ids=lambda size: str(size))
def test_every_form_of_attention(
    attention: str, batch: int, length: int, padding: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved("deepseek_v3", tmp_path_factory)
    inputs = families.inputs(batch, length, padding)
    keep = inputs["attention_mask"].bool()
    got = run(opened(folder, attention), tensors(inputs))[keep]
    close(got, families.logits(transformers_model(folder), inputs), of_max=1e-6)


@pytest.mark.parametrize(("attention", "op"), [("anchor", "mla2dsa.dense_attention"), ("sdpa", "scaled_dot_product"),
                                               ("eager", "aten.softmax")])  # fmt: skip
def test_form_of_attention_in_the_graph(attention: str, op: str) -> None:
    graph = captured(config_dict("minicpm3"), attention).program.graph
    assert sum(op in str(node.target) for node in graph.nodes) == 2


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "longcat_flash", "glm4_moe_lite"])
def test_experts_of_a_layer_are_one_node(name: str) -> None:
    graph = captured(config_dict(name)).program.graph
    layers = {"longcat_flash": 2}.get(name, 1)
    assert sum("moe_experts" in str(node.target) for node in graph.nodes) == layers


def test_longcats_zero_experts_return_their_input() -> None:
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    torch.manual_seed(0)
    config = families.config("longcat_flash")
    experts = LongcatFlashExperts(config)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    hidden, share = torch.randn(64, 64), torch.rand(64, 2)
    ids = torch.randint(0, experts.total_experts, (64, 2))
    assert (ids >= experts.num_routed_experts).sum() > 20
    with torch.no_grad():
        expected = experts(hidden, ids, share)
        with hf_interfaces.capturable(config):
            got = experts(hidden, ids, share)
    close(got, expected, of_max=1e-6)


def test_longcat_is_left_as_it_was() -> None:
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    own = LongcatFlashExperts.forward
    with hf_interfaces.capturable(families.config("longcat_flash")):
        assert LongcatFlashExperts.forward is not own
    assert LongcatFlashExperts.forward is own
    with hf_interfaces.capturable(families.config("deepseek_v3")):
        assert LongcatFlashExperts.forward is own
    with pytest.raises(UserError):
        capture(config_dict("longcat_flash", hidden_act="mish"))
    assert LongcatFlashExperts.forward is own


HYBRIDS = ("kimi_linear", "bailing_hybrid")


@pytest.mark.parametrize("length", [1, 64, 65, 150])
@pytest.mark.parametrize("name", HYBRIDS)
def test_linear_attention_at_any_length(name: str, length: int) -> None:
    """Its chunks are 64 tokens: a graph of a loop over them would be right for the first alone."""
    model, program = families.exported(name, "anchor")
    kwargs = families.inputs(2, length, padding=min(4, length - 1))
    close(families.logits(program.module(), kwargs), families.logits(model, kwargs), of_max=1e-5)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_graph_of_short_sequences_alone_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_private, "DELTA_ATTENTION", ())
    with pytest.raises(UserError, match=r"for up to 64 tokens alone, of 512: a graph of it would be wrong"):
        capture(config_dict(name))


@pytest.mark.parametrize(
    "given", [{"initial_state": torch.zeros(1)}, {"output_final_state": True}, {"chunk_size": 32}], ids=str
)
def test_linear_attention_that_is_asked_for_more_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="begins in a state"):
        hf_interfaces._delta_attention(*[torch.zeros(1, 1, 1, 1)] * 4, torch.zeros(1, 1, 1), **given)


def test_longcat_without_weights_for_its_zero_experts(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """transformers' parameter has rows for them that no forward reads; published checkpoints need not have those."""
    full = saved("longcat_flash", tmp_path_factory)
    weights = load_file(full / "model.safetensors")
    routed = {n: t for n, t in weights.items() if not any(f".experts.{e}." in n for e in range(8, 12))}
    assert len(routed) == len(weights) - 2 * 4 * 2  # layers, zero experts, gate and up
    (tmp_path / "config.json").write_text((full / "config.json").read_text())
    save_file(routed, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    source = WeightSource(checkpoint, captured(checkpoint.config))
    checkpoint.check_shapes(source.expected())
    batch = tensors(families.inputs(1, 12))
    assert torch.equal(run(source, batch), run(opened(full), batch))


# What cannot be captured


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nosuch"}, "model_type 'nosuch' is not one transformers knows"),
        ({}, "model_type None"),
        ({"model_type": "deepseek_v3", "hidden_size": "wide"}, "transformers does not accept it"),
        ({"model_type": "clip"}, "no causal language model class for model_type 'clip'"),
        ({"model_type": "deepseek_v3", "hidden_act": "nosuch"}, "transformers cannot build DeepseekV3ForCausalLM"),
    ],
    ids=["unknown-type", "no-type", "refused-field", "no-causal-lm", "cannot-build"],
)
def test_unusable_config(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        capture(config)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_default_dtype_survives_a_failure() -> None:
    with pytest.raises(UserError):
        capture({"model_type": "deepseek_v3", "hidden_act": "nosuch"}, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_unknown_form_of_attention() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        capture(config_dict("minicpm3"), attention="flash")


def test_export_failure_names_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Capture:
        raise RuntimeError("data-dependent\nmore")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(UserError, match=r"torch\.export cannot capture MiniCPM3ForCausalLM: data-dependent$"):
        capture(config_dict("minicpm3"))


@pytest.mark.parametrize("name", families.SPARSE)
def test_an_attention_that_is_sparse_already_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="gives its attention indices: not plain dense attention"):
        capture(config_dict(name))


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "lost", "options"),
    [("gpt_oss", "s_aux", {"num_local_experts": 2, "num_experts_per_tok": 1}), ("gemma2", "softcap", {})],
)
def test_an_argument_the_anchor_would_drop_is_refused(model_type: str, lost: str, options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"gives its attention .*{lost}"):
        capture({"model_type": model_type, **SMALL, **options})


def test_sliding_window_is_refused() -> None:
    with pytest.raises(UserError, match="MistralAttention gives its attention sliding_window"):
        capture({"model_type": "mistral", **SMALL, "sliding_window": 8})


@pytest.mark.parametrize("field", ["has_bias", "is_transposed", "has_post_expert_norm"])
def test_experts_of_another_layout_are_refused(field: str) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    hf_interfaces.register()
    module = families.build("deepseek_v3").model.layers[1].mlp.experts
    setattr(module, field, True)
    with pytest.raises(UserError, match=f"DeepseekV3.*experts with {field} cannot be captured"):
        ALL_EXPERTS_FUNCTIONS[hf_interfaces.NAME](module, torch.ones(1, 64), torch.zeros(1, 2).long(), torch.ones(1, 2))


def test_an_unknown_expert_activation_is_refused() -> None:
    with pytest.raises(UserError, match="expert activation Mish"):
        capture(config_dict("deepseek_v3", hidden_act="mish"))


def test_grouped_keys_are_repeated_for_their_queries() -> None:
    """Plain grouped-query attention goes through the anchor unchanged (find_mla refuses it later, with a reason)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    hf_interfaces.register()
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    out, weights = ALL_ATTENTION_FUNCTIONS[hf_interfaces.NAME](torch.nn.Identity(), q, k, v, causal[None, None])
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=causal).transpose(1, 2)
    assert weights is None
    close(out, expected, of_max=1e-6)


def test_read_config_gives_transformers_object() -> None:
    assert read_config(config_dict("deepseek_v3")).kv_lora_rank == 32
