"""Hand-written MLA attentions that write in place, each through another op or to another value."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from handwritten import SCALE, Dims, Mla, rms
from torch import Tensor

# Keys that are put together by writes


class BlankKeys(Mla):
    """K is zeros that `fill` writes k_nope and k_pe into."""

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        keys = k_nope.new_zeros(*k_nope.shape[:3], self.d.nope + self.d.rope)
        self.fill(keys, k_nope, k_pe.expand(-1, self.d.heads, -1, -1))
        return keys

    def fill(self, keys: Tensor, k_nope: Tensor, k_pe: Tensor) -> None:
        raise NotImplementedError


class NarrowedKeys(BlankKeys):
    def fill(self, keys: Tensor, k_nope: Tensor, k_pe: Tensor) -> None:
        keys.narrow(-1, 0, self.d.nope).copy_(k_nope)
        keys.narrow(-1, self.d.nope, self.d.rope).copy_(k_pe)


class SplitKeys(BlankKeys):
    def fill(self, keys: Tensor, k_nope: Tensor, k_pe: Tensor) -> None:
        first, last = keys.split([self.d.nope, self.d.rope], -1)
        first.copy_(k_nope)
        last.copy_(k_pe)


class ViewedTwiceKeys(Mla):
    """Through a view of a view, while attention reads another view that was made before."""

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        blank = k_nope.new_zeros(k_nope.shape[0], k_nope.shape[2], self.d.heads, self.d.nope + self.d.rope)
        keys = blank.transpose(1, 2)
        blank.flatten(2).unflatten(-1, (self.d.heads, -1))[..., : self.d.nope].copy_(k_nope.transpose(1, 2))
        blank.mT.mT[..., self.d.nope :].copy_(k_pe.transpose(1, 2))
        return keys


class JoinedKeys(BlankKeys):
    def fill(self, keys: Tensor, k_nope: Tensor, k_pe: Tensor) -> None:
        torch.cat([k_nope, k_pe], -1, out=keys)


# The rotation


class ComplexInPlace(Mla):
    """The rotation is a product written through view_as_complex; attention reads what that is a view of."""

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        angle = torch.atan2(*reversed(self.table(pos, x.dtype)))
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(torch.polar(torch.ones_like(angle), angle))
        return x


class PositionsWritten(Mla):
    def table(self, pos: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pos = pos.clone()
        pos.select(1, 0).fill_(3)
        return super().table(pos, dtype)


# The mask


class MaskDiagonalKept(Mla):
    """Says of the diagonal what holds anyway."""

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        visible = super().visible(mask, pos).clone()
        torch.diagonal(visible, 0, -2, -1).fill_(True)
        return visible


class MaskAndOut(Mla):
    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        visible = torch.ones(mask.shape[0], 1, mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
        torch.logical_and(visible, mask.bool()[:, None, None], out=visible)
        return visible


class MaskIndexPut(Mla):
    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        hidden = ~super().visible(mask, pos)
        bias = torch.zeros(hidden.shape, dtype=self.q_norm.dtype)
        bias[hidden] = float("-inf")
        return bias


class MaskScatter(Mla):
    """Hides padded keys by scattering False into the rows of a view of the causal triangle."""

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        visible = torch.ones(mask.shape[0], 1, mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
        visible.mT.squeeze(1).masked_fill_(~mask.bool()[:, :, None], False)
        return visible


class EagerInPlace(Mla):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = q @ k.mT
        scores *= SCALE
        scores.masked_fill_(~visible, float("-inf"))
        return scores.softmax(-1) @ v


class MaskInputWritten(Mla):
    """The caller's own mask is written, too."""

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        seen = mask.view(-1)
        mask.clamp_(max=1)
        return super().visible(seen.view(mask.shape), pos)


# Values that are written and read again


class NormInPlace(Mla):
    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent, k_pe = self.kv_a(x).split([self.d.rank, self.d.rope], -1)
        latent = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + 1e-6)
        latent.mul_(self.kv_norm)
        return super().latents(x)[0], latent, k_pe


class LatentWrittenBefore(Mla):
    """After K and V were made of it and before attention: the rewritten attention would read it too late."""

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        k_nope, v = super().expand(latent)
        latent[..., :2].mul_(3.0)
        return k_nope, v


class QueryWritten(Mla):
    def queries(self, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        q = super().queries(q_nope, q_pe)
        torch.mul(q[..., :3], 2.0, out=q[..., :3])
        return q


class QueriesForeach(Mla):
    def queries(self, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        q = super().queries(q_nope, q_pe)
        torch._foreach_mul_(list(q.chunk(2, -1)), 1.5)
        return q


class SiblingWritten(Mla):
    """k_pe is one half of what kv_a gives; the other half is written before k_pe is read."""

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent, k_pe = self.kv_a(x).split([self.d.rank, self.d.rope], -1)
        latent.mul_(1.5)
        return rms(self.q_a(x), self.q_norm), rms(latent, self.kv_norm), k_pe


# Writes after the attention


class After(Mla):
    """Writes when attention has read everything; what it wrote is part of the result."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        out = super().attend(q, k, v, visible)
        self.write(out, q, k, v, visible)
        return out + q.sum() + k.sum() + v.sum()

    def write(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> None:
        raise NotImplementedError


class OutWritten(After):
    def write(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> None:
        out.detach().mT[:, :, 1:].mul_(2.0)


class OperandsWritten(After):
    def write(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> None:
        q.mul_(2.0)
        torch.diagonal(k, 0, -2, -1).zero_()
        v.unflatten(-1, (2, -1)).select(-1, 0).fill_(1.0)


class MaskWrittenAfter(After):
    def write(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> None:
        visible.fill_(False)
        out.masked_fill_(visible[..., :1], 0.0)


class BranchWritesAfter(After):
    """Nobody reads what the branches give: they are there for what they write."""

    def write(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> None:
        torch.cond(visible.sum() > 40, lambda x: x.mul_(2.0).sum(), lambda x: x.mul_(3.0).sum(), (out,))


class StatisticsAfter(Mla):
    """A batch norm whose result nobody reads, and whose running statistics are part of the program."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("mean", torch.zeros(dims.hidden))
        self.register_buffer("var", torch.ones(dims.hidden))

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Any:
        attended = super().forward(x, mask, pos)
        F.batch_norm(x.flatten(0, 1), self.mean, self.var, training=True)  # type: ignore[arg-type]
        return attended


class HiddenWrittenAfter(Mla):
    """The residual is added in place, to what the attention has read."""

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Any:
        x = x * 1.5
        attended = super().forward(x, mask, pos)
        x += attended
        return x


# Weights and buffers


class CountsCalls(Mla):
    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Any:
        self.calls[1:].add_(1.0)  # type: ignore[operator, index]
        return super().forward(x, mask, pos) * self.calls[2]  # type: ignore[index]


class ScaleWritten(Mla):
    """The norm's scale is a buffer that is written through a view before it is read."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("scale", torch.ones(dims.rank))

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.scale.view(2, -1)[1].mul_(0.5)  # type: ignore[operator]
        q_resid, latent, k_pe = super().latents(x)
        return q_resid, latent * self.scale, k_pe


# No longer MLA, or no longer causal


class MaskDiagonal(Mla):
    """Every token is hidden from itself."""

    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        visible = super().visible(mask, pos).clone()
        torch.diagonal(visible, 0, -2, -1).fill_(False)
        return visible


class MaskStrided(Mla):
    def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
        visible = super().visible(mask, pos).clone()
        visible.as_strided((mask.shape[0],), (mask.shape[1] * mask.shape[1],)).fill_(False)
        return visible


class OutStrided(Mla):
    """What attention gives is read by its place in memory, which is another for a rewritten one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        out = super().attend(q, k, v, visible).transpose(1, 2)
        return out.as_strided(out.shape, out.stride()).transpose(1, 2)


class OutStridedCopy(Mla):
    """The same after an op that keeps strides, and as a copy."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        out = super().attend(q, k, v, visible) * 2.0
        return torch.as_strided_copy(out, (out.shape[0], self.d.heads, out.shape[2], self.d.v), out.stride())


class ProjectedStrided(Mla):
    """A linear layer's result lies in memory as it does whatever attention gives."""

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Any:
        y = super().forward(x, mask, pos)
        return y.as_strided(y.shape, y.stride())


class ScoresWritten(Mla):
    """What eager attention's softmax reads has lost its first key, through a view."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~visible, float("-inf"))
        scores[..., 1:2].sub_(3.0)
        return scores.softmax(-1) @ v


class KeysWritten(Mla):
    """`write` changes K after it was put together."""

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        keys = super().keys(k_nope, k_pe).clone(memory_format=torch.contiguous_format)
        self.write(keys)
        return keys

    def write(self, keys: Tensor) -> None:
        raise NotImplementedError


class KeysDiagonal(KeysWritten):
    def write(self, keys: Tensor) -> None:
        torch.diagonal(keys, 0, -2, -1).fill_(0.0)


class KeysComplex(KeysWritten):
    def write(self, keys: Tensor) -> None:
        torch.view_as_complex(keys.unflatten(-1, (-1, 2))).mul_(2.0)


class KeysOut(KeysWritten):
    def write(self, keys: Tensor) -> None:
        torch.mul(keys, 2.0, out=keys)


class KeysForeach(KeysWritten):
    def write(self, keys: Tensor) -> None:
        torch._foreach_add_([keys[:, :1], keys[:, 1:]], 1.0)


class KeysUnfolded(KeysWritten):
    def write(self, keys: Tensor) -> None:
        keys.unfold(-1, 4, 4).mul_(2.0)


class KeysIndexPut(KeysWritten):
    def write(self, keys: Tensor) -> None:
        keys.transpose(0, 1)[torch.tensor([0])] = 1.0


# Memory that is shared without a word in the schema


class KeysEinsum(KeysWritten):
    def write(self, keys: Tensor) -> None:
        torch.einsum("bhtd->bthd", keys).mul_(2.0)


class KeysDropout(KeysWritten):
    def write(self, keys: Tensor) -> None:
        F.dropout(keys, 0.1, training=False).mul_(2.0)


class SlowAndUntold(MaskAndOut):
    """What has to be functionalised is one write; another one, that attention has nothing to do with, cannot be."""

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Any:
        out = super().forward(x, mask, pos)
        F.dropout(out, 0.1, training=False).mul_(2.0)
        return out
