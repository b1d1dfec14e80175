"""What each op demands of its arguments: checked once, by the fake (symbolic shapes) and by the real implementation.

Every failed check raises ValueError naming the argument. Dims are related with `check_value`, which under
torch.export ties dynamic dims to each other without specialising them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compat.torch_private import check_value

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FLOAT8 = (torch.float8_e4m3fn,)
ROW_BYTES, WIDTH = 656, 576  # of a packed latent row (FlashMLA), and its channels
INTS = (torch.int32, torch.int64)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def check_lightning_indexer(
    q: Tensor, k: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int
) -> None:
    """q [B,T,HI,dI], k [B,S,dI], weights [B,T,HI], key_begin and key_end [B,T]; topk > 0."""
    typed("q", q, 4, FLOATS)
    _like("k", k, 3, "q", q)
    typed("weights", weights, 3, FLOATS, q)
    match("k", k, 0, "q", q, 0)
    match("k", k, 2, "q", q, 3)
    for dim in range(3):
        match("weights", weights, dim, "q", q, dim)
    check_range(key_begin, key_end, q)
    check_value(topk > 0, lambda: f"topk must be positive, got {topk}")


def check_sparse_mla(q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> None:
    """q [B,T,H,R+dr], kv [B,S,R+dr], indices [B,T,K] int32; 0 < kv_lora_rank <= R+dr."""
    typed("q", q, 4, FLOATS)
    _like("kv", kv, 3, "q", q)
    typed("indices", indices, 3, (torch.int32,), q)
    match("kv", kv, 0, "q", q, 0)
    match("kv", kv, 2, "q", q, 3)
    match("indices", indices, 0, "q", q, 0)
    match("indices", indices, 1, "q", q, 1)
    check_value(kv_lora_rank > 0, lambda: f"kv_lora_rank must be positive, got {kv_lora_rank}")
    check_value(
        kv_lora_rank <= kv.shape[2],
        lambda: f"kv_lora_rank is {kv_lora_rank}, but a row of kv has only {kv.shape[2]} channels",
    )


def check_attention_mass(q: Tensor, kv: Tensor, key_begin: Tensor, key_end: Tensor) -> None:
    """q [B,R,H,d], kv [B,S,d], key_begin and key_end [B,R]."""
    typed("q", q, 4, FLOATS)
    _like("kv", kv, 3, "q", q)
    match("kv", kv, 0, "q", q, 0)
    match("kv", kv, 2, "q", q, 3)
    check_range(key_begin, key_end, q)


def check_cache_write(cache: Tensor, new: Tensor, slots: Tensor) -> None:
    """cache [B,C,d], new [B,T,d], slots [B,T]."""
    typed("cache", cache, 3, FLOATS)
    typed("new", new, 3, FLOATS, cache)
    typed("slots", slots, 2, INTS, cache)
    match("new", new, 0, "cache", cache, 0)
    match("new", new, 2, "cache", cache, 2)
    match("slots", slots, 0, "new", new, 0)
    match("slots", slots, 1, "new", new, 1)


def check_dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """q [B,H,T,d], k [B,H,S,d], v [B,H,S,dv], mask [B|1, H|1, T, S] bool or floating, or None (then T == S)."""
    typed("q", q, 4, FLOATS)
    _like("k", k, 4, "q", q)
    _like("v", v, 4, "q", q)
    for dim in (0, 1):
        match("k", k, dim, "q", q, dim)
        match("v", v, dim, "q", q, dim)
    match("k", k, 3, "q", q, 3)
    match("v", v, 2, "k", k, 2)
    if mask is None:
        check_value(
            q.shape[2] == k.shape[2],
            lambda: f"mask is None (causal), which needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}",
        )
        return
    typed("mask", mask, 4, (torch.bool, *FLOATS), q)
    match("mask", mask, 2, "q", q, 2)
    match("mask", mask, 3, "k", k, 2)
    for dim in (0, 1):
        if isinstance(mask.shape[dim], int) and mask.shape[dim] != 1:
            match("mask", mask, dim, "q", q, dim)


def check_moe_experts(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str
) -> None:
    """hidden [N,D], top_k_index and top_k_weights [N,k], gate_up_proj [E,2I,D], down_proj [E,D,I]."""
    typed("hidden", hidden, 2, FLOATS)
    typed("top_k_index", top_k_index, 2, INTS, hidden)
    typed("top_k_weights", top_k_weights, 2, FLOATS, hidden)
    _like("gate_up_proj", gate_up_proj, 3, "hidden", hidden)
    _like("down_proj", down_proj, 3, "hidden", hidden)
    match("top_k_index", top_k_index, 0, "hidden", hidden, 0)
    match("top_k_weights", top_k_weights, 0, "top_k_index", top_k_index, 0)
    match("top_k_weights", top_k_weights, 1, "top_k_index", top_k_index, 1)
    match("gate_up_proj", gate_up_proj, 2, "hidden", hidden, 1)
    match("down_proj", down_proj, 0, "gate_up_proj", gate_up_proj, 0)
    match("down_proj", down_proj, 1, "hidden", hidden, 1)
    check_value(
        gate_up_proj.shape[1] == 2 * down_proj.shape[2],
        lambda: f"gate_up_proj {_shape(gate_up_proj)} must hold twice the {down_proj.shape[2]} channels of down_proj",
    )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not known, expected one of {', '.join(ACTIVATIONS)}")


def check_quantize_fp8_rows(x: Tensor) -> None:
    """x [...,d], at least one dim, d > 0."""
    check_value(x.ndim > 0, lambda: "x must have at least one dim")
    typed("x", x, x.ndim, FLOATS)
    check_value(x.shape[-1] > 0, lambda: f"x has rows without channels, its shape is {list(x.shape)}")


def check_lightning_indexer_fp8(
    q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, key_begin: Tensor, key_end: Tensor, topk: int
) -> None:
    """q [B,T,HI,dI] and k [B,S,dI] e4m3, k_scale [B,S] float32, weights [B,T,HI], key_begin and key_end [B,T]; topk > 0."""
    typed("q", q, 4, FLOAT8)
    typed("k", k, 3, FLOAT8, q)
    typed("k_scale", k_scale, 2, (torch.float32,), q)
    typed("weights", weights, 3, FLOATS, q)
    match("k", k, 0, "q", q, 0)
    match("k", k, 2, "q", q, 3)
    match("k_scale", k_scale, 0, "k", k, 0)
    match("k_scale", k_scale, 1, "k", k, 1)
    for dim in range(3):
        match("weights", weights, dim, "q", q, dim)
    check_range(key_begin, key_end, q)
    check_value(topk > 0, lambda: f"topk must be positive, got {topk}")


def check_pack_latent_fp8(kv: Tensor) -> None:
    """kv [B,S,576]."""
    typed("kv", kv, 3, FLOATS)
    check_value(kv.shape[2] == WIDTH, lambda: f"a row of kv must have {WIDTH} channels, got {list(kv.shape)}")


def check_sparse_mla_fp8(q: Tensor, kv_packed: Tensor, indices: Tensor) -> None:
    """q [B,T,H,576], kv_packed [B,S,656] uint8, indices [B,T,K] int32."""
    typed("q", q, 4, FLOATS)
    typed("kv_packed", kv_packed, 3, (torch.uint8,), q)
    typed("indices", indices, 3, (torch.int32,), q)
    check_value(q.shape[3] == WIDTH, lambda: f"a head of q must have {WIDTH} channels, got {list(q.shape)}")
    check_value(
        kv_packed.shape[2] == ROW_BYTES,
        lambda: f"a row of kv_packed must have {ROW_BYTES} bytes, got {list(kv_packed.shape)}",
    )
    match("kv_packed", kv_packed, 0, "q", q, 0)
    match("indices", indices, 0, "q", q, 0)
    match("indices", indices, 1, "q", q, 1)


def check_range(key_begin: Tensor, key_end: Tensor, q: Tensor) -> None:
    for name, bound in (("key_begin", key_begin), ("key_end", key_end)):
        typed(name, bound, 2, INTS, q)
        match(name, bound, 0, "q", q, 0)
        match(name, bound, 1, "q", q, 1)


def typed(name: str, tensor: Tensor, ndim: int, dtypes: tuple[torch.dtype, ...], beside: Tensor | None = None) -> None:
    """Rank, dtype, and the device of the op's first tensor."""
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dims, got shape {_shape(tensor)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected one of {', '.join(str(d) for d in dtypes)}")
    if beside is not None and tensor.device != beside.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {beside.device}, as the first argument")


def _like(name: str, tensor: Tensor, ndim: int, model_name: str, model: Tensor) -> None:
    if tensor.dtype != model.dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {model.dtype}, as {model_name}")
    typed(name, tensor, ndim, FLOATS, model)


def match(name: str, tensor: Tensor, dim: int, other_name: str, other: Tensor, other_dim: int) -> None:
    check_value(
        tensor.shape[dim] == other.shape[other_dim],
        lambda: (
            f"{name} has shape {_shape(tensor)}, its dim {dim} must be {other.shape[other_dim]}"
            f" (dim {other_dim} of {other_name} {_shape(other)})"
        ),
    )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
