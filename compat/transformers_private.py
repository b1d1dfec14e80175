"""What we use of transformers without its promise. Each function raises `MovedError` when this transformers lacks the name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .private_names import Library

TRANSFORMERS = Library(
    "transformers",
    ">=5.23,<5.25",
    names={
        "transformers.conversion_mapping:get_model_conversion_mapping": "names in files become names of the model",
        "transformers.core_model_loading:WeightConverter": "several tensors in files become one of the model",
        "transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS": "experts stay one node of a captured graph",
        "transformers.integrations.moe:_default_apply_gate": "which experts have a gate of their own",
        "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS": "the mask of a captured graph",
        "transformers.masking_utils:causal_mask_function": "which masks are plain causal",
        "transformers.masking_utils:sdpa_mask": "the masks that are not",
        "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS": "attention stays one node of a captured graph",
        "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "the class of a model type",
        "transformers.models.bailing_hybrid.modeling_bailing_hybrid:chunk_kimi_delta_attention": "a loop that no graph can hold",
        "transformers.models.kimi_linear.modeling_kimi_linear:chunk_kimi_delta_attention": "a loop that no graph can hold",
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
        "WeightTransform.operations": "several tensors in files become one of the model",
        "WeightTransform.rename_source_key": "names in files become names of the model",
        "WeightTransform.source_patterns": "several tensors in files become one of the model",
        "WeightTransform.target_patterns": "several tensors in files become one of the model",
        "PreTrainedModel._init_weights": "buffers that are not in checkpoints are computed",
    },
)


@dataclass(frozen=True)
class Join:
    """Tensors of files that become one of the model: how their names end, and how its name ends.

    sources: in the order in which they come; `*` stands for the number of an expert, and each expert's come together.
    steps: what transformers does with them, by the names of its classes.
    """

    target: str
    sources: tuple[str, ...]
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Naming:
    """How transformers finds a model's tensors in files. renamings: applied in turn to each name in the files, before any join."""

    renamings: tuple[Callable[[str], str], ...] = ()
    joins: tuple[Join, ...] = ()

    def renamed(self, name: str) -> str:
        for anew in self.renamings:
            name = anew(name)
        return name


def naming_of(model: torch.nn.Module) -> Naming:
    """transformers' own mapping from names in checkpoints to those of `model`."""
    mapping = TRANSFORMERS.find("transformers.conversion_mapping:get_model_conversion_mapping")(model)
    converter = TRANSFORMERS.find("transformers.core_model_loading:WeightConverter")
    renamings = tuple(_renaming(each) for each in mapping if not isinstance(each, converter))
    return Naming(renamings, tuple(_join(each) for each in mapping if isinstance(each, converter)))


def _renaming(transform: Any) -> Callable[[str], str]:
    anew = TRANSFORMERS.get(transform, "WeightTransform.rename_source_key")
    return lambda name: str(anew(name)[0])


def _join(transform: Any) -> Join:
    def plain(patterns: str) -> tuple[str, ...]:
        return tuple(it.replace("\\.", ".") for it in TRANSFORMERS.get(transform, f"WeightTransform.{patterns}"))

    operations = tuple(type(each).__name__ for each in TRANSFORMERS.get(transform, "WeightTransform.operations"))
    return Join(plain("target_patterns")[0], plain("source_patterns"), operations)


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


DELTA_ATTENTION = ("bailing_hybrid", "kimi_linear")  # model types whose linear attention is a function of their module


@contextmanager
def delta_attention(model_type: str, function: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, the linear attention of a prefill is `function`, which is given what theirs is."""
    name = f"transformers.models.{model_type}.modeling_{model_type}:chunk_kimi_delta_attention"
    theirs = TRANSFORMERS.find(name)
    module = sys.modules[name.partition(":")[0]]
    with mock.patch.object(module, theirs.__name__, function):
        yield
