"""Hand-written attentions that are not dense causal MLA, one departure each: what `find_mla` has to refuse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from handwritten import SCALE, Dims, Mla, rms
from torch import Tensor, nn

# Keys and values


class Gqa(Mla):
    """No latent: keys and values are projections of the hidden state, two heads each."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.k = nn.Linear(dims.hidden, 2 * (dims.nope + dims.rope), bias=False)
        self.v = nn.Linear(dims.hidden, 2 * dims.v, bias=False)

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        q_nope, q_pe = self.split_queries(self.q_a(x))
        k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1) for p in (self.k, self.v))
        k_nope, k_pe = k.split([self.d.nope, self.d.rope], -1)
        q = torch.cat([q_nope, self.rotate(q_pe, pos)], -1)
        out = self.attend(q, torch.cat([k_nope, self.rotate(k_pe, pos)], -1), v, self.visible(mask, pos))
        return self.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class GroupedSdpa(Mla):
    def kv_rows(self) -> int:
        return super().kv_rows() // 2

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.kv_b(latent).unflatten(-1, (self.d.heads // 2, -1)).transpose(1, 2)
        nope, v = kv.split([self.d.nope, self.d.v], -1)
        return nope, v

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        return torch.cat([k_nope, k_pe.expand(-1, self.d.heads // 2, -1, -1)], -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=SCALE, enable_gqa=True)


class SeparateUp(Mla):
    """Two up-projections of one latent."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.v_b = nn.Linear(dims.rank, dims.heads * dims.v, bias=False)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        return super().expand(latent)[0], self.v_b(latent).unflatten(-1, (self.d.heads, -1)).transpose(1, 2)


class BiasedUp(Mla):
    bias = True


class NormedKeys(Mla):
    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        return super().keys(rms(k_nope, torch.ones(self.d.nope, dtype=k_nope.dtype)), k_pe)


class ScaledValues(Mla):
    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        k_nope, v = super().expand(latent)
        return k_nope, v * 0.5


class KPePerHead(Mla):
    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.kv_a = nn.Linear(dims.hidden, dims.rank + dims.heads * dims.rope, bias=False)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent, k_pe = self.kv_a(x).split([self.d.rank, self.d.heads * self.d.rope], -1)
        return rms(self.q_a(x), self.q_norm), rms(latent, self.kv_norm), k_pe

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        return torch.cat([k_nope, k_pe], -1)

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        if x.shape[1] == 1:  # k_pe
            x = x.squeeze(1).unflatten(-1, (self.d.heads, -1)).transpose(1, 2)
        return super().rotate(x, pos)


class KPeProjectedApart(Mla):
    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.k_pe = nn.Linear(dims.hidden, dims.rope, bias=False)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (*super().latents(x)[:2], self.k_pe(x))


class KPeNormed(Mla):
    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_resid, latent, k_pe = super().latents(x)
        return q_resid, latent, k_pe / k_pe.norm(dim=-1, keepdim=True)


class KPeInTheMiddle(Mla):
    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        k_pe = k_pe.expand(-1, self.d.heads, -1, -1)
        return torch.cat([k_nope[..., :2], k_pe, k_nope[..., 2:]], -1)


class HalfRotated(Mla):
    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        cos, sin = (t[..., :1] for t in self.table(pos, x.dtype))
        a, b, rest = x.split([1, 1, self.d.rope - 2], -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class TokenShift(Mla):
    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        k_nope, v = super().expand(latent)
        return torch.cat([k_nope[:, :, :1], k_nope[:, :, :-1]], 2), v


class FarTokenShift(Mla):
    """Tokens change places only in sequences of more than 40."""

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        k_nope, v = super().expand(latent)
        return torch.cat([k_nope[:, :, 40:], k_nope[:, :, :40]], 2), v


class HalfFilled(Mla):
    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        keys = k_nope.new_zeros(*k_nope.shape[:3], self.d.nope + self.d.rope)
        keys[..., : self.d.nope] = k_nope
        keys[:, :2, :, self.d.nope :] = k_pe
        return keys


class FlattenedTokens(Mla):
    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.kv_b(latent.flatten(0, 1)).view(*latent.shape[:2], self.d.heads, -1).transpose(1, 2)
        nope, v = kv.split([self.d.nope, self.d.v], -1)
        return nope, v


class LongerKeys(Mla):
    """As many cached tokens as new ones."""

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        q_resid, latent, k_pe = self.latents(x)
        q_nope, q_pe = self.split_queries(q_resid)
        k_nope, v = self.expand(torch.cat([latent, latent], 1))
        k_pe = self.rotate(k_pe.unsqueeze(1), pos)
        keys = self.keys(k_nope, torch.cat([k_pe, k_pe], 2))
        out = F.scaled_dot_product_attention(self.queries(q_nope, self.rotate(q_pe, pos)), keys, v, scale=SCALE)
        return self.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


# Hidden states


class TwoHiddenStates(Mla):
    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().latents(x * 2)[0], *super().latents(x)[1:]


class HiddenWrittenBetween(Mla):
    """Queries read the hidden state after it was written in place."""

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x * 1.5
        latent, k_pe = super().latents(x)[1:]
        x[..., :1].add_(1.0)
        return super().latents(x)[0], latent, k_pe


# Masks


class Masked(Mla):
    """A condition on top of causal & padding. i: query, j: key."""

    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        raise NotImplementedError

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        i = torch.arange(mask.shape[1])
        return super().visible(mask, pos) & self.also(i[:, None], i[None], mask, pos)


class Sliding3(Masked):
    window = 3

    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return (j > i - self.window)[None, None]


class Sliding512(Sliding3):
    window = 512


class Sliding16384(Sliding3):
    window = 16384


class SlidingByDivision(Masked):
    """A window of 512, of which the graph only shows 2 and 256."""

    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return ((i - j) // 2 < 256)[None, None]


class SlidingByLogarithm(Masked):
    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return ((i - j).clamp(min=1).double().log2() < 9)[None, None]


class SlidingTriangles(Masked):
    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).triu(-100)


class WindowInTensor(Masked):
    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return (i - j < torch.tensor(300))[None, None]


class WindowInTable(Masked):
    """Which distances are seen is looked up in a constant."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.seen = torch.arange(600) < 300

    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return self.seen[(i - j).clamp(0, 599)]


class WindowInBuffer(Masked):
    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("seen", torch.arange(600) < 300)

    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return self.seen[(i - j).clamp(0, 599)]  # type: ignore[index]


class Chunked64(Masked):
    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return (i // 64 == j // 64)[None, None]


class Strided(Masked):
    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return ((i - j) % 4 != 3)[None, None]


class HidesToken7(Mla):
    """The mask input is compared with a number that ordinary padding never has."""

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        i = torch.arange(mask.shape[1])
        return (i[None] <= i[:, None])[None, None] & (mask != 7)[:, None, None]


class ByPosition(Masked):
    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return (pos[:, :, None] >= pos[:, None])[:, None]


class ByActivation(Masked):
    def also(self, i: Tensor, j: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return (self.q_norm.sum() > 0).expand(1, 1, 1, 1)


class Bidirectional(Mla):
    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        return mask.bool()[:, None, None].expand(-1, 1, mask.shape[1], -1)


class NoMask(Mla):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=SCALE)


class PrefixLm(Mla):
    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        return super().visible(mask, pos) | (torch.arange(mask.shape[1]) < 2)[None, None, None]


class Alibi(Mla):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        bias = torch.where(visible, -(i[:, None] - i[None]).abs().to(q.dtype), float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=SCALE)


class InChunksOf8(Mla):
    """Runs for multiples of eight tokens only."""

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        length = mask.shape[1]
        block = torch.ones(length // 8, 8, length // 8, 8, dtype=torch.bool).view(length, length)
        return super().visible(mask, pos) & block


# Cores


class Eager(Mla):
    def scores(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return (q @ k.transpose(2, 3) * SCALE).masked_fill(~visible, float("-inf"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return torch.softmax(self.scores(q, k, visible), -1) @ v


class SoftmaxOverQueries(Eager):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return torch.softmax(self.scores(q, k, visible), -2) @ v


class ScaledAfterMask(Eager):
    def scores(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return (q @ k.transpose(2, 3)).masked_fill(~visible, -1e4) * 1e-3


class WeakMask(Eager):
    def scores(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return (q @ k.transpose(2, 3)).masked_fill(~visible, -5.0)


class HalfAdded(Eager):
    def scores(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return torch.add(q @ k.transpose(2, 3), torch.where(visible, 0.0, -1e9).to(q.dtype), alpha=0)


class SoftCapped(Eager):
    def scores(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        return (30 * torch.tanh(q @ k.transpose(2, 3) / 30)).masked_fill(~visible, float("-inf"))


class WithSink(Eager):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = self.scores(q, k, visible)
        scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1)
        return torch.softmax(scores, -1)[..., :-1] @ v


class ProbabilitiesRead(Eager):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        probabilities = torch.softmax(self.scores(q, k, visible), -1)
        return probabilities @ v + probabilities.amax(-1, keepdim=True)


class EagerDropout(Eager):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.dropout(torch.softmax(self.scores(q, k, visible), -1), 0.1, training=True) @ v


class SdpaDropout(Mla):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=0.1, scale=SCALE)


class FlashOp(Mla):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        v = F.pad(v, (0, self.d.nope + self.d.rope - self.d.v))
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
        return out[..., : self.d.v]  # type: ignore[no-any-return]


class InsideCond(Mla):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
            return (torch.softmax((q @ k.mT).masked_fill(~visible, float("-inf")), -1) @ v).contiguous()

        def skip(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
            return (v * 2.0).contiguous()

        return torch.cond(visible.sum() > 3, attend, skip, (q, k, v, visible))  # type: ignore[no-any-return]
