"""What calibration knows of one MLA layer: its linear maps (from the weights) and samples (from running the dense model)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...runtime.shelf import Kept, Shelf


@dataclass(frozen=True)
class SiteMaps:
    """The linear maps of one MLA layer, read off the graph and the weights. Floating dtype of the calibration (float32).

    Written with x the layer's normed hidden state [D] and u the query latent `q_resid` [Rq] (x itself without q latent):
    head h's pre-softmax logit is ``scale * (q_absorbed[h] @ u . c_s + rope_t(q_rope[h] @ u) . rope_s(k_rope @ x_s))`` with
    ``c = latent_gain * (latent @ x) / rms(latent @ x)``, with `latent_eps` added to the mean of squares under the root. Where the
    projection has a bias, it is added to ``latent @ x`` and to ``k_rope @ x``.

    scale: softmax scale of the layer.
    q_absorbed: [H, kv_lora_rank, Rq] = W_UK[h]^T W_q_nope[h].
    q_rope: [H, qk_rope_head_dim, Rq], rows in half-split rotary order (pair i is rows i and i + dr/2, frequency i).
    latent: [kv_lora_rank, D], rows of kv_a_proj before the latent norm.
    latent_gain: [kv_lora_rank], gain of the latent norm (with any constant factor the model puts on the latent).
    k_rope: [qk_rope_head_dim, D], half-split rotary order.
    latent_eps: of the latent norm; it is what a token without a hidden state (a row of zeros in the embedding) is divided by.
    latent_bias, k_rope_bias: [kv_lora_rank] and [qk_rope_head_dim], None without.
    """

    scale: float
    q_absorbed: Tensor
    q_rope: Tensor
    latent: Tensor
    latent_gain: Tensor
    k_rope: Tensor
    latent_eps: float
    latent_bias: Tensor | None = None
    k_rope_bias: Tensor | None = None

    def raw_latent(self, hidden: Tensor) -> Tensor:
        """hidden: [T, D]. [T, kv_lora_rank] before the latent norm."""
        return linear(hidden, self.latent, self.latent_bias)

    def latent_norm(self, raw: Tensor) -> Tensor:
        """raw: [T, kv_lora_rank], as `raw_latent` has it. [T], what the norm multiplies it by beside its gain."""
        return (raw.square().mean(-1) + self.latent_eps).rsqrt()

    def raw_k_rope(self, hidden: Tensor) -> Tensor:
        """hidden: [T, D]. [T, qk_rope_head_dim] before the rotation."""
        return linear(hidden, self.k_rope, self.k_rope_bias)


@dataclass(frozen=True)
class SiteSample:
    """One calibration sequence of T tokens seen by one layer of the dense model, with R sampled query rows.

    hidden: [T, D]; q_resid: [T, Rq]; cos, sin: [T, qk_rope_head_dim / 2] (zero-width for NoPE layers).
    rows: [R] int64, the sampled query positions, ascending.
    query: [R, H, kv_lora_rank + qk_rope_head_dim], absorbed and rotated; key: [T, kv_lora_rank + qk_rope_head_dim].
    mass: [R, T], dense attention probabilities averaged over heads; 0 where a key is in the future.
    """

    hidden: Tensor
    q_resid: Tensor
    cos: Tensor
    sin: Tensor
    rows: Tensor
    query: Tensor
    key: Tensor
    mass: Tensor


class ShelvedSamples(Sequence[SiteSample]):
    """Samples of one layer, each put together anew when it is asked for: go through them one by one.

    shelved: the fields of every sample. Whoever is through with one may take it out. layers: whose mass theirs is the mean of.
    """

    def __init__(
        self,
        shelved: list[Mapping[str, Kept]],
        layers: int = 1,  # fixed by what samples are of
    ) -> None:
        self.shelved, self.layers = shelved, layers

    def add_mass(self, other: ShelvedSamples, shelf: Shelf) -> None:
        """The mass of one more layer on the same rows, into the mean."""
        self.layers += 1
        for number, (mine, its) in enumerate(zip(self.shelved, other.shelved, strict=True)):
            mean = torch.lerp(mine["mass"].get(), its["mass"].get(), 1 / self.layers)
            self.shelved[number] = {**mine, "mass": shelf.put(mean)}

    def __len__(self) -> int:
        return len(self.shelved)

    @overload
    def __getitem__(self, index: int) -> SiteSample: ...
    @overload
    def __getitem__(self, index: slice) -> ShelvedSamples: ...
    def __getitem__(self, index: int | slice) -> SiteSample | ShelvedSamples:
        if isinstance(index, slice):
            return ShelvedSamples(self.shelved[index], self.layers)
        return SiteSample(**{name: kept.get() for name, kept in self.shelved[index].items()})
