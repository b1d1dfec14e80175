"""What we use of transformers without its promise. Each function raises `MovedError` when this transformers lacks the name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .private_names import Library

TRANSFORMERS = Library(
    "transformers",
    ">=5.23,<5.25",
    names={
        "transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS": "experts stay one node of a captured graph",
        "transformers.integrations.moe:_default_apply_gate": "which experts have a gate of their own",
        "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS": "the mask of a captured graph",
        "transformers.masking_utils:causal_mask_function": "which masks are plain causal",
        "transformers.masking_utils:sdpa_mask": "the masks that are not",
        "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS": "attention stays one node of a captured graph",
        "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "the class of a model type",
        "transformers.models.longcat_flash.modeling_longcat_flash:LongcatFlashExperts": "experts that no registry reaches",
    },
    attributes={
        "Experts._apply_gate": "which experts have a gate of their own",
        "Experts.has_bias": "how the weights of experts lie",
        "Experts.has_gate": "how the weights of experts lie",
        "Experts.has_post_expert_norm": "how the weights of experts lie",
        "Experts.is_concatenated": "how the weights of experts lie",
        "Experts.is_transposed": "how the weights of experts lie",
        "PreTrainedConfig._attn_implementation": "which attention a model is built with",
        "PreTrainedConfig._experts_implementation": "which experts a model is built with",
        "PreTrainedModel._init_weights": "buffers that are not in checkpoints are computed",
    },
)


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any], experts: Callable[..., Any]) -> None:
    """Make `name` a valid attention, mask and experts implementation."""
    for registry, function in (
        ("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS", attention),
        ("transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS", mask),
        ("transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS", experts),
    ):
        TRANSFORMERS.find(registry).register(name, function)


def choose(config: Any, attention: str, experts: str) -> None:
    """Which implementations a model of this config is built with, by their registered names."""
    TRANSFORMERS.set(config, "PreTrainedConfig._attn_implementation", attention)
    TRANSFORMERS.set(config, "PreTrainedConfig._experts_implementation", experts)


def is_plain_causal(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask function, as a mask implementation is given one, is transformers' own that hides nothing but the future."""
    return mask_function is TRANSFORMERS.find("transformers.masking_utils:causal_mask_function")


def explicit_mask(
    batch: int, queries: int, keys: int, mask_function: Callable[..., Any], **others: Any
) -> Tensor | None:
    """transformers' own bool mask for a mask function, never left out for being causal."""
    others["allow_is_causal_skip"] = False
    make = TRANSFORMERS.find("transformers.masking_utils:sdpa_mask")
    mask: Tensor | None = make(batch, queries, keys, mask_function=mask_function, **others)
    return mask


def unusual_experts(experts: torch.nn.Module) -> list[str]:
    """In what these experts are not down(act(gate) * up) with weights [experts, gate and up, in] and [experts, in, up]."""
    usual = {
        "has_bias": False,
        "is_transposed": False,
        "has_post_expert_norm": False,
        "has_gate": True,
        "is_concatenated": True,
    }
    found = [name for name, value in usual.items() if TRANSFORMERS.get(experts, f"Experts.{name}") is not value]
    plain = TRANSFORMERS.find("transformers.integrations.moe:_default_apply_gate")
    own = TRANSFORMERS.get(type(experts), "Experts._apply_gate") is not plain
    return [*found, *(["a gate of their own"] if own else [])]


def causal_lm_class_name(model_type: str) -> str | None:
    """The class of a model type's causal language model; None when it has none."""
    names = TRANSFORMERS.find("transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    name: str | None = names.get(model_type)
    return name


def initialise(model: torch.nn.Module, module: torch.nn.Module) -> None:
    """Give the parameters and buffers of `module`, a part of `model`, the values that an untrained model has."""
    with torch.no_grad():
        TRANSFORMERS.get(model, "PreTrainedModel._init_weights")(module)


@contextmanager
def longcat_experts(forward: Callable[..., Tensor]) -> Iterator[None]:
    """While it lasts, LongCat-Flash's experts, which no registry reaches, run `forward`."""
    experts = TRANSFORMERS.find("transformers.models.longcat_flash.modeling_longcat_flash:LongcatFlashExperts")
    with mock.patch.object(experts, "forward", forward):
        yield
