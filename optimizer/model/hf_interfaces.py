"""How a model is captured through transformers' own registries: attention, mask and experts each stay one readable node.

An attention anchor sees queries, keys, values and a mask. Anything else an attention is given (top-k indices, soft caps,
sinks, windows) would be lost in the graph, so the anchor refuses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...compat import transformers_private
from ...errors import UserError
from ...kernels import ops  # noqa: F401  (registers torch.ops.mla2dsa)

NAME = "mla2dsa"

_LOST = ("indices", "sliding_window", "softcap", "position_bias", "s_aux", "sinks", "cache", "block_sequence_ids")


def register() -> None:
    """Make NAME a valid attention, mask and experts implementation of transformers."""
    transformers_private.register(NAME, _attention, _mask, _experts)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    lost = [name for name in _LOST if others.get(name) is not None]
    if lost:
        raise UserError(
            f"{type(module).__name__} gives its attention {', '.join(lost)}: not plain dense attention, nothing to convert"
        )
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    out = torch.ops.mla2dsa.dense_attention(query, key, value, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any] | None = None, **others: Any
) -> Tensor | None:
    """Causal & key padding as plain ops. Any other pattern is left to transformers, for find_mla to judge."""
    if mask_function is not None and not transformers_private.is_plain_causal(mask_function):
        return transformers_private.explicit_mask(batch_size, q_length, kv_length, mask_function, **others)
    device = others.get("device", "cpu")
    rows = torch.arange(q_length, device=device) + others.get("q_offset", 0)
    columns = torch.arange(kv_length, device=device) + others.get("kv_offset", 0)
    visible: Tensor = (columns[None, :] <= rows[:, None])[None, None]
    padding = others.get("attention_mask")
    if padding is not None:
        visible = visible & padding[:, None, None, :kv_length].to(torch.bool)
    return visible.expand(batch_size, -1, -1, -1)


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    unread = transformers_private.unusual_experts(module)
    if unread:
        raise UserError(f"{type(module).__name__}: experts with {', '.join(unread)} cannot be captured yet")
    return _run_experts(module, hidden_states, top_k_index, top_k_weights)


def _run_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    activation = _activation(module)
    count = module.down_proj.shape[0]
    out: Tensor = torch.ops.mla2dsa.moe_experts(
        hidden_states, top_k_index, top_k_weights, module.gate_up_proj[:count], module.down_proj, activation
    )
    return out


def _activation(module: Any) -> str:
    names = {
        "SiLUActivation": "silu",
        "SiLU": "silu",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_pytorch_tanh",
        "ReLU": "relu",
    }
    name = names.get(type(module.act_fn).__name__)
    if name is None:
        raise UserError(
            f"{type(module).__name__}: expert activation {type(module.act_fn).__name__} cannot be captured yet"
        )
    return name


def _longcat_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """LongCat-Flash has its own loop, with 'zero experts' that return their input."""
    out = _run_experts(module, hidden_states, top_k_index, top_k_weights)
    share = torch.where(top_k_index >= module.num_routed_experts, top_k_weights, 0.0).sum(-1, keepdim=True)
    return out + (hidden_states * share).to(out.dtype)


def _delta_attention(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if initial_state is not None or output_final_state or "chunk_size" in others:
        raise UserError("linear attention that begins in a state, or gives one back, cannot be captured yet")
    return torch.ops.mla2dsa.delta_attention(query, key, value, g, beta, use_qk_l2norm_in_kernel), None


@contextlib.contextmanager
def capturable(hf_config: Any) -> Iterator[None]:
    """While it lasts, what ignores transformers' registries and has a Python loop that torch.export cannot follow, or would unroll for
    the length that it sees, is ours: LongCat-Flash's experts, and the linear attention of hybrids."""
    model_type = hf_config.get_text_config().model_type
    with contextlib.ExitStack() as stack:
        if model_type == "longcat_flash":
            stack.enter_context(transformers_private.longcat_experts(_longcat_experts))
        if model_type in transformers_private.DELTA_ATTENTION:
            stack.enter_context(transformers_private.delta_attention(model_type, _delta_attention))
        yield
