"""Hand-written attentions: one plain MLA, and variants that change one thing each. `find_mla` must tell which still are MLA.

Every method is one step of the attention, so that a variant is the step it overrides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

SCALE = 0.3


@dataclass(frozen=True)
class Dims:
    heads: int = 4
    nope: int = 8
    rope: int = 4
    v: int = 6
    rank: int = 16
    hidden: int = 32
    q_rank: int = 24


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Mla(nn.Module):
    """q latent, half-split rope, cat, boolean causal & padding mask, SDPA."""

    bias: ClassVar[bool] = False

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.d = d = dims
        self.q_a = nn.Linear(d.hidden, d.q_rank, bias=False)
        self.q_b = nn.Linear(d.q_rank, d.heads * (d.nope + d.rope), bias=False)
        self.kv_a = nn.Linear(d.hidden, d.rank + d.rope, bias=False)
        self.kv_b = nn.Linear(d.rank, self.kv_rows(), bias=self.bias)
        self.o = nn.Linear(d.heads * d.v, d.hidden, bias=False)
        self.q_norm = nn.Parameter(torch.rand(d.q_rank) + 0.5)
        self.kv_norm = nn.Parameter(torch.rand(d.rank) + 0.5)

    def kv_rows(self) -> int:
        return self.d.heads * (self.d.nope + self.d.v)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_resid, kv latent, k_pe [B, T, rope] before rotation."""
        latent, k_pe = self.kv_a(x).split([self.d.rank, self.d.rope], -1)
        return rms(self.q_a(x), self.q_norm), rms(latent, self.kv_norm), k_pe

    def split_queries(self, q_resid: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q_b(q_resid).view(*q_resid.shape[:2], self.d.heads, -1).transpose(1, 2)
        nope, pe = q.split([self.d.nope, self.d.rope], -1)
        return nope, pe

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """k_nope [B, H, T, nope], v [B, H, T, v]"""
        kv = self.kv_b(latent).view(*latent.shape[:2], self.d.heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.d.nope, self.d.v], -1)
        return k_nope, v

    def table(self, pos: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin [B, 1, T, rope / 2]"""
        steps = torch.arange(1, self.d.rope // 2 + 1, device=pos.device).to(dtype)
        angle = (pos.unsqueeze(-1).to(dtype) / steps)[:, None]
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        cos, sin = self.table(pos, x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def queries(self, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        return torch.cat([q_nope, q_pe], -1)

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        return torch.cat([k_nope, k_pe.expand(-1, self.d.heads, -1, -1)], -1)

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        """[B, 1, T, T] bool, True attends"""
        i = torch.arange(mask.shape[1])
        return (i[None] <= i[:, None])[None, None] & mask.bool()[:, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=SCALE)

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Any:
        q_resid, latent, k_pe = self.latents(x)
        q_nope, q_pe = self.split_queries(q_resid)
        k_nope, v = self.expand(latent)
        q = self.queries(q_nope, self.rotate(q_pe, pos))
        k = self.keys(k_nope, self.rotate(k_pe.unsqueeze(1), pos))
        out = self.attend(q, k, v, self.visible(mask, pos))
        return self.o(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class NoPe(Mla):
    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        return x


class Model(nn.Module):
    """x + self_attn(x), so that the attention has a module path."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        out: Tensor = x + self.self_attn(x, mask, pos)
        return out


def build(attention: type[Mla], dims: Dims = Dims(), dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model(attention(dims)).eval().to(dtype).requires_grad_(False)


def inputs(model: Model, batch: int, length: int, left: int = 0, right: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, mask, pos; the first row is padded on the left, the last one on the right."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(batch, length, model.self_attn.d.hidden, generator=torch.Generator().manual_seed(length))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :left] = 0
    if right:
        mask[-1, -right:] = 0
    return x.to(dtype), mask, (mask.cumsum(-1) - 1).clamp(min=0)


def export(model: Model, dynamic: bool = True, length: int = 7) -> ExportedProgram:
    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if dynamic else {0: Dim.DYNAMIC}
    shapes = {"x": axes, "mask": axes, "pos": axes}
    with torch.no_grad():
        return torch.export.export(model, inputs(model, 2, length), dynamic_shapes=shapes, strict=False)
