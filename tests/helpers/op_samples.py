"""Inputs shared by the tests of the ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOAT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small_ints(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values -2..2: every dtype sums them exactly, and equal scores are common."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ranges(batch: int, queries: int, slots: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ragged ranges, some empty, some reaching beyond the keys on either side."""
    g = torch.Generator().manual_seed(seed)
    begin = torch.randint(-3, slots + 2, (batch, queries), generator=g)
    return begin, begin + torch.randint(-2, slots + 3, (batch, queries), generator=g)


def causal(batch: int, queries: int, past: int = 0) -> tuple[Tensor, Tensor]:
    end = torch.arange(past + 1, past + queries + 1, dtype=torch.int32).expand(batch, queries)
    return torch.zeros_like(end), end


def op_samples() -> dict[str, tuple[Any, ...]]:
    begin, end = causal(2, 5, past=4)
    q, kv = randn(2, 5, 3, 12, dtype=torch.float32), randn(2, 9, 12, seed=1, dtype=torch.float32)
    indices = torch.randint(-1, 9, (2, 5, 4), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    heads = q.transpose(1, 2)
    keys = kv[:, None].expand(2, 3, 9, 12).contiguous()
    return {
        "lightning_indexer": (q, kv, randn(2, 5, 3, dtype=torch.float32), begin, end, 4),
        "sparse_mla": (q, kv, indices, 0.3, 8),
        "cache_write": (kv, q[:, :, 0].contiguous(), torch.tensor([[8, 0, 9, -1, 4]] * 2)),
        "attention_mass": (q, kv, begin, end, 0.3),
        "dense_attention": (heads, keys, keys[..., :8], torch.ones(2, 1, 5, 9, dtype=torch.bool), 0.3),
        "moe_experts": (randn(7, 6), torch.tensor([[0, 5]] * 7), randn(7, 2), randn(3, 8, 6), randn(3, 6, 4), "silu"),
    }
