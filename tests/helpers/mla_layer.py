"""A small random MLA layer, written unabsorbed, and what calibration would know of it; shared by the indexer tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mla2dsa.optimizer.indexer.samples import SiteMaps, SiteSample


def rms_norm(x: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).rsqrt()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE of x [..., T, dr], written with complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag), -1)


@dataclass(frozen=True)
class MlaLayer:
    """q_nope: [H, dn, Rq]; q_rope: [H, dr, Rq]; up_k: [H, dn, R]; latent: [R, D]; gain: [R]; k_rope: [dr, D]."""

    q_a: Tensor
    q_nope: Tensor
    q_rope: Tensor
    up_k: Tensor
    latent: Tensor
    gain: Tensor
    k_rope: Tensor
    common: Tensor

    @property
    def scale(self) -> float:
        return float((self.q_nope.shape[1] + self.q_rope.shape[1]) ** -0.5)

    def maps(self) -> SiteMaps:
        absorbed = torch.einsum("hnr,hnq->hrq", self.up_k, self.q_nope)
        return SiteMaps(self.scale, absorbed, self.q_rope, self.latent, self.gain, self.k_rope, latent_eps=0.0)

    def sample(self, seed: int, length: int = 96, rows: Tensor | None = None, vocabulary: int = 0) -> SiteSample:
        """Random hidden states with a common part; from a fixed vocabulary, seldom words included, where one is given."""
        generator = torch.Generator().manual_seed(seed)
        count = vocabulary or length
        source = torch.Generator().manual_seed(0) if vocabulary else generator
        noise = torch.randn(count, self.latent.shape[1], generator=source, dtype=torch.float64).to(self.latent)
        hidden = rms_norm(noise + self.common)
        if vocabulary:
            hidden = hidden[torch.multinomial(1 / torch.arange(1.0, count + 1), length, True, generator=generator)]
        resid = rms_norm(hidden @ self.q_a.T)
        angles = torch.arange(length)[:, None] / 100 ** torch.linspace(0, 1, len(self.k_rope) // 2 + 1)[:-1]
        cos, sin = angles.cos().to(hidden), angles.sin().to(hidden)
        rows = torch.arange(length // 4, length, 2) if rows is None else rows
        maps = self.maps()
        latent = self.gain * rms_norm(hidden @ self.latent.T)
        key = torch.cat((latent, rope(hidden @ self.k_rope.T, cos, sin)), -1)
        turned = rope(torch.einsum("hdq,tq->htd", self.q_rope, resid), cos, sin).transpose(0, 1)
        query = torch.cat((torch.einsum("hrq,tq->thr", maps.q_absorbed, resid), turned), -1)[rows]
        mass = self.logits(hidden, resid, cos, sin).softmax(-1).mean(0)[rows]
        return SiteSample(hidden, resid, cos, sin, rows, query, key, mass)

    def logits(self, hidden: Tensor, resid: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[H, T, T] pre-softmax logits of the unabsorbed layer, -inf for future keys."""
        latent = self.gain * rms_norm(hidden @ self.latent.T)
        q_nope = torch.einsum("hnq,tq->htn", self.q_nope, resid)
        k_nope = torch.einsum("hnr,tr->htn", self.up_k, latent)
        q_rope = rope(torch.einsum("hdq,tq->htd", self.q_rope, resid), cos, sin)
        scores = q_nope @ k_nope.mT + q_rope @ rope(hidden @ self.k_rope.T, cos, sin).T
        future = torch.ones(len(hidden), len(hidden), dtype=torch.bool).triu(1)
        return (self.scale * scores).masked_fill(future, -torch.inf)


def make_layer(
    heads: int = 8,
    hidden: int = 64,
    q_lora: int = 48,
    kv_lora: int = 32,
    rope_dim: int = 8,
    nope: int = 16,
    sharpness: float = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> MlaLayer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return MlaLayer(
        q_a=normal(q_lora, hidden) / hidden**0.5,
        q_nope=normal(heads, nope, q_lora) / q_lora**0.5 * sharpness,
        q_rope=normal(heads, rope_dim, q_lora) / q_lora**0.5 * sharpness,
        up_k=normal(heads, nope, kv_lora) / kv_lora**0.5,
        latent=normal(kv_lora, hidden) / hidden**0.5,
        gain=1 + 0.2 * normal(kv_lora),
        k_rope=normal(rope_dim, hidden) / hidden**0.5,
        common=normal(hidden),
    )
