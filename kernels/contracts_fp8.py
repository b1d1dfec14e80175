"""What the float8 ops demand of their arguments: as `contracts`, ValueError names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compat.torch_private import check_value
from .contracts import FLOATS, check_range, match, typed

FLOAT8 = (torch.float8_e4m3fn,)
ROW_BYTES, WIDTH = 656, 576


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
