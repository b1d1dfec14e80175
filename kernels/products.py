"""Products of half-precision matrices on CPUs that have no instructions for them, which are most.

torch multiplies bfloat16 and float16 there one number at a time: several times as long as making float32 of the operands, a part
after the other, and rounding the result. Sums are float32 either way, so the results are as good.
"""

from __future__ import annotations

import math
import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat.torch_private import cpu_multiplies_float16
from .cpu import has_bfloat16_gemm

# benchmarks/products.py: parts of 1 MiB to 4 MiB take about the same time, of 16 MiB up to twice as long.
PART = 2**20  # numbers of the larger operand that are float32 at once
# benchmarks/products.py: up to 4 rows what widening the weight takes is about what it saves, or more.
FEW_ROWS = 4
ROWS = 1024  # of the other operand at once: fixed by memory, 72 MiB at DeepSeek-V3's widest; the weight is widened again for the next


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch's: x [..., I], weight [O, I], bias [O] -> [..., O]."""
    rows = math.prod(x.shape[:-1])
    if rows <= FEW_ROWS or not _served(x, weight) or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight, bias)
    if bias is not None and not (bias.shape == weight.shape[:1] and bias.dtype == x.dtype):
        return F.linear(x, weight, bias)
    flat, out = x.reshape(rows, -1), x.new_empty(rows, len(weight))
    step = max(1, PART // max(1, weight.shape[1]))
    for some, given in zip(out.split(ROWS), flat.split(ROWS), strict=True):
        wide = given.float()
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            some[:, part] = F.linear(wide, weight[part].float(), None if bias is None else bias[part].float())
    return out.view(*x.shape[:-1], len(weight))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """As torch's, of any ranks; widened where both are matrices."""
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2] or not _served(a, b):
        return torch.matmul(a, b)
    if b.ndim == 2:
        return linear(a, b.T)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    several = [x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (a, b)]
    out = a.new_empty(math.prod(batch), a.shape[-2], b.shape[-1])
    step = max(1, PART // max(1, *(math.prod(x.shape[-2:]) for x in (a, b, out))))
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        out[part] = several[0][part].float() @ several[1][part].float()
    return out.view(*batch, *out.shape[-2:])


def _served(a: Tensor, b: Tensor) -> bool:
    """Whether torch would be slower, and nobody wants gradients, which are torch's business."""
    trained = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return slow(a) and a.dtype == b.dtype and not trained


def slow(x: Tensor) -> bool:
    """Whether it is on a CPU, in a dtype that torch multiplies slower there than float32."""
    return x.device.type == "cpu" and _slow(x.dtype)


@cache  # every product of every token asks
def _slow(dtype: torch.dtype) -> bool:
    if dtype == torch.float16:  # Arm has had it for long; measured on x86 alone
        return platform.machine() in ("x86_64", "AMD64") and not cpu_multiplies_float16()
    return dtype == torch.bfloat16 and not has_bfloat16_gemm(dtype)


aten = torch.ops.aten
# What a graph may call -> what serves it.
SERVED: dict[Any, Any] = {
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.bmm.default: matmul,
    aten.mm.default: matmul,
}
