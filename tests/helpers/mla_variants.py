"""Hand-written attentions that are MLA, each spelled or laid out in another way: what `find_mla` has to find."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from handwritten import SCALE, Dims, Mla, NoPe, rms
from torch import Tensor, nn


class IsCausal(Mla):
    padded: ClassVar[bool] = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class PeFirst(Mla):
    def queries(self, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        return torch.cat([q_pe, q_nope], -1)

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        return torch.cat([k_pe.expand(-1, self.d.heads, -1, -1), k_nope], -1)


class RepeatedKPe(Mla):
    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        return torch.cat([k_nope, k_pe.repeat_interleave(self.d.heads, 1)], -1)


class PartsFirst(Mla):
    """kv_b rows as [nope of all heads | v of all heads]."""

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        nope, v = self.kv_b(latent).split([self.d.heads * self.d.nope, self.d.heads * self.d.v], -1)
        return tuple(part.unflatten(-1, (self.d.heads, -1)).transpose(1, 2) for part in (nope, v))  # type: ignore[return-value]


class ChannelsFirst(Mla):
    """kv_b rows as [channel][head]."""

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.kv_b(latent).unflatten(-1, (-1, self.d.heads)).permute(0, 3, 1, 2)
        nope, v = kv.split([self.d.nope, self.d.v], -1)
        return nope, v


class ShiftedHeads(Mla):
    """Head h reads the key rows of head h + 1: odd, but only another layout of W_UK."""

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        k_nope, v = super().expand(latent)
        return torch.cat([k_nope[:, 1:], k_nope[:, :1]], 1), v


class SpareHead(Mla):
    """kv_b makes one head more than is used."""

    def kv_rows(self) -> int:
        return (self.d.heads + 1) * (self.d.nope + self.d.v)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.kv_b(latent).unflatten(-1, (self.d.heads + 1, -1)).transpose(1, 2)[:, 1:]
        nope, v = kv.split([self.d.nope, self.d.v], -1)
        return nope, v


class HeadsInPairs(Mla):
    """Two query heads share one key head of the up-projection."""

    def kv_rows(self) -> int:
        return super().kv_rows() // 2

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.kv_b(latent).unflatten(-1, (self.d.heads // 2, -1)).transpose(1, 2).repeat_interleave(2, 1)
        nope, v = kv.split([self.d.nope, self.d.v], -1)
        return nope, v


class AdditiveMask(Mla):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        mask = torch.where(visible, 0.0, float("-inf")).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)


class OneMinusMask(Mla):
    """Keeps the mask as a number: (1 - visible) * -1e9."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(1.0 - visible.to(q.dtype)) * -1e9, scale=SCALE)


class MaskPerHead(Mla):
    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        return super().visible(mask, pos).expand(-1, self.d.heads, -1, -1)


class SquareMask(Mla):
    """[T, T], without padding."""

    padded: ClassVar[bool] = False

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        length = mask.shape[1]
        return torch.ones(length, length, dtype=torch.bool).tril()


class MaskedFill(Mla):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) * SCALE).masked_fill(~visible, float("-inf"))
        return torch.softmax(scores, -1) @ v


class Where(Mla):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = torch.where(visible, q @ k.mT / 3.0, torch.finfo(q.dtype).min)
        return F.dropout(torch.softmax(scores, -1), 0.1, training=False) @ v


class WhereHidden(Mla):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = q @ k.mT / 3.0
        return torch.softmax(torch.where(~visible, torch.full_like(scores, -1e30), scores), -1) @ v


class AddedMask(Mla):
    """Eager attention with the scale on the query, and an additive mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        mask = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, float("-inf"))
        return torch.softmax((q * SCALE) @ k.transpose(2, 3) + mask, -1) @ v


class FusedDown(Mla):
    """q_a and kv_a are one projection."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.q_a = self.kv_a = None  # type: ignore[assignment]
        self.fused = nn.Linear(dims.hidden, dims.q_rank + dims.rank + dims.rope, bias=True)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, latent, k_pe = self.fused(x).split([self.d.q_rank, self.d.rank, self.d.rope], -1)
        return rms(q, self.q_norm), rms(latent, self.kv_norm), k_pe


class NoQueryLatent(Mla):
    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.q_b = nn.Linear(dims.hidden, dims.heads * (dims.nope + dims.rope), bias=False)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (x, *super().latents(x)[1:])


class InterleavedRope(Mla):
    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        cos, sin = self.table(pos, x.dtype)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class FullTableRope(Mla):
    """transformers' form: a table of full width, x * cos + rotate_half(x) * sin."""

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        cos, sin = (torch.cat([t, t], -1) for t in self.table(pos, x.dtype))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin


class ComplexRope(Mla):
    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        steps = torch.arange(1, self.d.rope // 2 + 1).to(x.dtype)
        angle = (pos.unsqueeze(-1).to(x.dtype) / steps)[:, None]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


class FilledBuffer(Mla):
    """K is a fresh buffer that is written in place; k_pe is broadcast by the write (DeepSeek's own modelling code)."""

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        keys = k_nope.new_empty(*k_nope.shape[:3], self.d.nope + self.d.rope)
        keys[..., : self.d.nope] = k_nope
        keys[..., self.d.nope :] = k_pe
        return keys


class FilledZeros(Mla):
    """As FilledBuffer, but the buffer starts as zeros, which must not be read as a tag."""

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        keys = torch.zeros(*k_nope.shape[:3], self.d.nope + self.d.rope, dtype=k_nope.dtype)
        keys[..., : self.d.nope] = k_nope
        keys[..., self.d.nope :] = k_pe
        return keys


class MaskWrittenInPlace(Mla):
    """This needs the slow way, run_decompositions."""

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        visible = torch.ones(mask.shape[0], 1, mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
        visible &= mask.bool()[:, None, None]
        return visible


class ScatteredSlices(Mla):
    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        keys = k_nope.new_empty(*k_nope.shape[:3], self.d.nope + self.d.rope)
        keys = torch.slice_scatter(keys, k_nope, -1, 0, self.d.nope)
        return torch.slice_scatter(keys, k_pe.expand(-1, self.d.heads, -1, -1), -1, self.d.nope)


MLA = [
    Mla, IsCausal, PeFirst, RepeatedKPe, PartsFirst, ChannelsFirst, ShiftedHeads, SpareHead, HeadsInPairs, AdditiveMask,
    OneMinusMask, MaskPerHead, SquareMask, MaskedFill, Where, WhereHidden, AddedMask, FusedDown, NoQueryLatent,
    InterleavedRope, FullTableRope, ComplexRope, NoPe, FilledBuffer, FilledZeros, MaskWrittenInPlace, ScatteredSlices,
]  # fmt: skip
