"""Quantised weights as the numbers they stand for, each in the way of the library that wrote the format."""

from __future__ import annotations

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the values of NVFP4's four bits; the highest one is the sign
_NVFP4_GROUP = 16


def blocks(weight: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """weight [O, I] (float8) times its block scale [ceil(O / rows), ceil(I / columns)] (float32), as float32 [O, I].

    DeepSeek-V3's `weight_dequant` (inference/kernel.py): y = x * scale_inv of the block that holds x.
    """
    result = torch.empty(weight.shape, dtype=torch.float32)
    for block_row, scales in enumerate(scale):
        part = slice(block_row * rows, (block_row + 1) * rows)
        result[part] = weight[part].float() * scales.repeat_interleave(columns)[: weight.shape[1]]
    return result


def int4(packed: Tensor, scale: Tensor) -> Tensor:
    """packed [O, I / 8] int32, the first value in the lowest bits, each with 8 added; scale [O, I / group]. [O, I] in scale's dtype.

    compressed-tensors multiplies in the dtype of the scale, so runtimes see just these numbers.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    values = ((packed.unsqueeze(-1) >> shifts) & 15).flatten(1) - 8
    grouped = values.view(*scale.shape, -1).to(scale.dtype) * scale.unsqueeze(-1)
    return grouped.flatten(1)


def nvfp4(packed: Tensor, scale: Tensor, second: Tensor) -> Tensor:
    """packed [O, I / 2] uint8, the first value in the low bits; scale [O, I / 16] (float8); second: one for all. float32 [O, I]."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    values = table[torch.stack((packed & 15, packed >> 4), dim=-1).long()].flatten(1)
    grouped = values.view(packed.shape[0], -1, _NVFP4_GROUP) * (scale.float() * second.float().reshape(())).unsqueeze(
        -1
    )
    return grouped.flatten(1)
