"""Tiny random models of every MLA family in transformers, and how to export them: shared by the tests of the passes."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights

VOCAB = 128
MAX_LENGTH = 512
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 128,
}  # fmt: skip
_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
_BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "max_position_embeddings": MAX_LENGTH, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.1,
}  # fmt: skip
_MOE = {
    "moe_intermediate_size": 16, "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 4, "topk_group": 2,
}  # fmt: skip
_HYBRID_MOE = {k: v for k, v in _MOE.items() if k != "n_routed_experts"} | {"num_local_experts": 8}
_SPARSE_SECOND = {"mlp_layer_types": ["dense", "sparse"]}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_INDEXER = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 4}


@dataclass(frozen=True)
class Family:
    """One model type with one choice of options. `sites`: the MLA layers' module paths. `sparse`: already DSA.

    `named_dims`: dynamic shapes with bounds export; otherwise only `Dim.DYNAMIC` does (the model's own code chunks).
    """

    model_type: str
    options: dict[str, Any]
    sites: tuple[str, ...] = ("model.layers.0.self_attn", "model.layers.1.self_attn")
    drop: tuple[str, ...] = ()
    sparse: bool = False
    named_dims: bool = True
    q_latent: bool = True
    rope: bool = True
    class_name: str | None = None


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family("deepseek_v2", {**_MOE, "rope_parameters": _YARN, "first_k_dense_replace": 1,
                                          "topk_method": "group_limited_greedy"}),
    "deepseek_v2-lite": Family("deepseek_v2", {**_MOE, "n_group": 1, "topk_group": 1, "rope_parameters": _YARN,
                                               "first_k_dense_replace": 1, "q_lora_rank": None}, q_latent=False),
    "deepseek_v3": Family("deepseek_v3", {**_MOE, "rope_parameters": _YARN, "first_k_dense_replace": 1,
                                          "num_mtp_layers": 0}),
    "deepseek_v3-halfsplit": Family("deepseek_v3", {**_MOE, "rope_parameters": _PLAIN, "first_k_dense_replace": 1,
                                                    "num_mtp_layers": 0, "rope_interleave": False}),
    "longcat_flash": Family(
        "longcat_flash",
        {"num_layers": 2, "ffn_hidden_size": 96, "head_dim": 8, "rope_parameters": _PLAIN, "moe_topk": 2,
         "n_routed_experts": 8, "zero_expert_num": 4, "expert_ffn_hidden_size": 16},
        sites=tuple(f"model.layers.{i}.self_attn.{j}" for i in range(2) for j in range(2)),
        drop=("num_hidden_layers", "intermediate_size"),
    ),
    "glm4_moe_lite": Family("glm4_moe_lite", {**_MOE, "rope_parameters": _PLAIN, **_SPARSE_SECOND}),
    "minicpm3": Family("minicpm3", {"rope_parameters": _PLAIN}),
    "mistral4": Family("mistral4", {**_MOE, "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1},
                                    "first_k_dense_replace": 1}, class_name="Mistral4ForCausalLM"),
    "youtu": Family("youtu", {"rope_parameters": _PLAIN}),
    "axk1": Family("axk1", {**_MOE, "rope_parameters": _YARN, **_SPARSE_SECOND}),
    "kimi_linear": Family(
        "kimi_linear",
        {**_HYBRID_MOE, **_HYBRID, **_SPARSE_SECOND, "q_lora_rank": None,
         "linear_head_dim": 8, "linear_num_heads": 2},
        sites=("model.layers.1.self_attn",), drop=("n_routed_experts",), named_dims=False, q_latent=False, rope=False,
    ),
    "bailing_hybrid": Family(
        "bailing_hybrid",
        {**_HYBRID_MOE, **_HYBRID, "first_k_dense_replace": 1, "head_dim": 8, "rope_parameters": _PLAIN,
         "layer_group_size": 2, "num_mtp_layers": 0},
        sites=("model.layers.1.self_attn",), drop=("q_lora_rank",), named_dims=False, q_latent=False,
    ),
    "deepseek_v32": Family("deepseek_v32", {**_MOE, **_INDEXER, "rope_parameters": _YARN, "first_k_dense_replace": 1,
                                            "head_dim": 8}, sparse=True, named_dims=False),
    "glm_moe_dsa": Family("glm_moe_dsa", {**_MOE, **_INDEXER, "rope_parameters": _PLAIN, **_SPARSE_SECOND},
                          sparse=True, named_dims=False),
}  # fmt: skip

DENSE = tuple(name for name, family in FAMILIES.items() if not family.sparse)
SPARSE = tuple(name for name, family in FAMILIES.items() if family.sparse)


def config(name: str, **options: Any) -> Any:
    """The transformers config of a family; `options` override its own."""
    from transformers import CONFIG_MAPPING

    family = FAMILIES[name]
    base = {k: v for k, v in _BASE.items() if k not in family.drop}
    made = CONFIG_MAPPING[family.model_type](**{**base, **family.options, **options})
    made._experts_implementation = "batched_mm"  # the default loops over experts, which cannot be exported
    return made


def build(
    name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> nn.Module:
    """A random frozen model in eval mode. `attention` is transformers' attn_implementation."""
    import transformers

    made = config(name, **options)
    made._attn_implementation = attention
    torch.manual_seed(0)
    class_name = FAMILIES[name].class_name
    with torch.device(device):
        if class_name:  # not in the auto map
            model = getattr(transformers, class_name)(made)
        else:
            model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention)
    model = model.eval().to(dtype)
    if device != "meta":
        _randomise(model)
    for module in model.modules():
        if type(module).__name__ == "LongcatFlashExperts":  # it has no experts_implementation, only a loop
            module.forward = types.MethodType(_longcat_experts, module)
    return model.requires_grad_(False)


def _randomise(model: nn.Module) -> None:
    """Norm weights away from 1, router biases away from 0, and no uninitialised memory."""
    for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in tensor_name and tensor_name.endswith("weight"):
            tensor.data.uniform_(0.5, 1.5)
        elif tensor_name.endswith("e_score_correction_bias"):
            tensor.data.uniform_(0, 0.1)
        elif tensor.is_floating_point() and (not tensor.isfinite().all() or tensor.abs().max() > 1e3):
            tensor.data.normal_(0, 0.1)


def _longcat_experts(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """LongcatFlashExperts without its loop over experts; ids past the routed ones are identity experts."""
    tokens, picked = top_k_index.shape
    flat = top_k_index.reshape(-1)
    ids = flat.clamp(max=self.num_routed_experts - 1)
    x = hidden.repeat_interleave(picked, 0)
    gate, up = torch.bmm(self.gate_up_proj[ids], x.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    y = torch.bmm(self.down_proj[ids], (self.act_fn(gate) * up).unsqueeze(-1)).squeeze(-1)
    y = torch.where((flat >= self.num_routed_experts).unsqueeze(-1), x, y) * top_k_weights.reshape(-1, 1)
    return y.view(tokens, picked, -1).sum(1).to(hidden.dtype)


def inputs(batch: int, length: int, padding: int = 0, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Keyword inputs of a causal LM; the first row starts with `padding` padded tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {**{name: tensor.to(device) for name, tensor in tensors.items()}, "use_cache": False}


def dynamic_shapes(named: bool = True) -> dict[str, Any]:
    """Dynamic batch and sequence for `inputs`."""
    batch, seq = (Dim("batch", min=1, max=64), Dim("seq", min=1, max=MAX_LENGTH)) if named else [Dim.DYNAMIC] * 2
    axes = {0: batch, 1: seq}
    return {"input_ids": axes, "attention_mask": axes, "position_ids": axes, "use_cache": None}


def export(model: nn.Module, named_dims: bool = True, length: int = 7) -> ExportedProgram:
    """torch.export with dynamic batch and sequence, under no_grad as every capture is."""
    kwargs = inputs(2, length, device=next(model.parameters()).device.type)
    with torch.no_grad():
        return torch.export.export(model, (), kwargs, dynamic_shapes=dynamic_shapes(named_dims), strict=False)


def export_anchored(model: nn.Module) -> ExportedProgram:
    """The product's own capture of the model's config, with the model's weights."""
    from mla2dsa.optimizer.model.capture import capture

    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}  # type: ignore[operator, union-attr]
    program = capture(config, "anchor", next(model.parameters()).dtype).program
    weights = model.state_dict()
    for name in program.state_dict:
        program.state_dict[name] = nn.Parameter(weights[name], requires_grad=False)
    return program


@functools.cache
def exported(name: str, attention: str) -> tuple[Any, ExportedProgram]:
    """(model, program) in float32 with named dims where they work; shared by all tests, so never to be changed."""
    model = build(name, "sdpa" if attention == "anchor" else attention)
    program = export_anchored(model) if attention == "anchor" else export(model, FAMILIES[name].named_dims)
    return model, program


def indexer_weights(config: IndexerConfig, hidden_size: int, q_width: int, seed: int = 0) -> IndexerWeights:
    """A random indexer, k_norm included."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2 + (name == "k_norm.weight")
        for name, shape in IndexerWeights.shapes(config, hidden_size, q_width).items()
    }
    return IndexerWeights.from_tensors(tensors)


@torch.no_grad()
def logits(model: Any, kwargs: dict[str, Any]) -> Tensor:
    """[tokens that are not padding, vocab]"""
    out: Tensor = model(**kwargs).logits
    return out[kwargs["attention_mask"].bool()]
