"""find_mla on hand-written attentions that are MLA, however they are spelled; what it must refuse is in the next file."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from families import indexer_weights
from handwritten import SCALE, Dims, Mla, Model, NoPe, build, export, inputs, rms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.passes.matching.sites import MlaSite
from mla2dsa.passes.mla_to_dsa import Converted, mla_to_dsa, prepare

CONFIG = IndexerConfig(index_topk=64, index_n_heads=2, index_head_dim=8)
SHAPES = [(2, 7, 0, 0), (3, 33, 5, 0), (2, 12, 0, 3), (1, 1, 0, 0)]  # batch, length, left padding, right padding


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
ATTENTION = "self_attn"


def convert(model: Model) -> Converted:
    d = model.self_attn.d
    q_width = d.hidden if isinstance(model.self_attn, NoQueryLatent) else d.q_rank
    return mla_to_dsa(export(model), CONFIG, {ATTENTION: indexer_weights(CONFIG, d.hidden, q_width)})


def assert_equal_to_dense(model: Model, converted: Converted) -> None:
    """To rounding in float64: index_topk exceeds every length here."""
    rewritten = converted.program.module()
    for batch, length, left, right in SHAPES:
        args = inputs(model, batch, length, left, right)
        real = args[1].bool()
        with torch.no_grad():
            torch.testing.assert_close(rewritten(*args)[real], model(*args)[real], rtol=0, atol=1e-10)


def site_of(model: Model) -> MlaSite:
    found = prepare(export(model))[1]
    assert not found.misses
    (site,) = found.sites
    return site


@pytest.mark.parametrize("attention", MLA, ids=lambda a: a.__name__)
def test_an_mla_attention_is_found_and_rewritten(attention: type[Mla]) -> None:
    model = build(attention)
    converted = convert(model)
    (site,) = converted.found.sites
    assert (site.name, converted.found.misses) == (ATTENTION, ())
    assert (site.padding is not None) == getattr(attention, "padded", True)
    assert converted.functionalised == (attention is MaskWrittenInPlace)
    assert_equal_to_dense(model, converted)


def test_a_site_says_what_was_proved() -> None:
    d = Dims(heads=3, nope=10, rope=4, v=6, rank=20, hidden=28, q_rank=12)
    site = site_of(build(Mla, d))
    assert (site.dims.num_heads, site.dims.qk_nope_head_dim, site.dims.qk_rope_head_dim) == (3, 10, 4)
    assert (site.dims.v_head_dim, site.dims.kv_lora_rank, site.dims.hidden_size) == (6, 20, 28)
    assert (site.dims.q_lora_rank, site.dims.q_width, site.core.scale, site.rope_first) == (12, 12, SCALE, False)
    assert torch.equal(site.uk_rows, torch.arange(3)[:, None] * 16 + torch.arange(10))
    assert torch.equal(site.uv_rows, torch.arange(3)[:, None] * 16 + 10 + torch.arange(6))
    assert site.k_pe_rows == (20, 21, 22, 23)


@pytest.mark.parametrize(
    ("attention", "pairs"),
    [(Mla, ((0, 2), (1, 3))), (FullTableRope, ((0, 2), (1, 3))), (InterleavedRope, ((0, 1), (2, 3))),
     (ComplexRope, ((0, 1), (2, 3)))],
    ids=lambda x: getattr(x, "__name__", str(x)),
)  # fmt: skip
def test_the_rotation_is_read_off(attention: type[Mla], pairs: tuple[tuple[int, int], ...]) -> None:
    rope = site_of(build(attention)).rope
    assert rope is not None
    assert (rope.pairs, rope.table, rope.complex_table) == (pairs, (0, 1), attention is ComplexRope)


def test_an_unrotated_key_has_no_rope_and_a_missing_query_latent_none() -> None:
    assert site_of(build(NoPe)).rope is None
    site = site_of(build(NoQueryLatent))
    assert (site.q_resid, site.dims.q_lora_rank, site.dims.q_width) == (None, None, site.dims.hidden_size)
    assert site.q_input is site.hidden


def test_a_module_used_twice_is_two_sites_with_one_indexer() -> None:
    class Twice(Model):
        def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
            return super().forward(super().forward(x, mask, pos), mask, pos)

    model = Twice(build(Mla).self_attn)
    converted = convert(model)
    assert [site.name for site in converted.found.sites] == [ATTENTION, ATTENTION]
    assert len([name for name in converted.program.state_dict if ".indexer." in name]) == 5
    assert_equal_to_dense(model, converted)


@st.composite
def any_dims(draw: st.DrawFn) -> Dims:
    return Dims(
        heads=draw(st.integers(1, 5)), nope=draw(st.integers(1, 9)), rope=2 * draw(st.integers(1, 4)),
        v=draw(st.integers(1, 9)), rank=draw(st.integers(1, 17)), hidden=draw(st.integers(2, 19)),
        q_rank=draw(st.integers(1, 11)),
    )  # fmt: skip


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(dims=any_dims(), attention=st.sampled_from([Mla, PeFirst, ChannelsFirst, InterleavedRope, MaskedFill]))
def test_any_dims(dims: Dims, attention: type[Mla]) -> None:
    model = build(attention, dims)
    converted = convert(model)
    proved = converted.found.sites[0].dims
    assert (proved.num_heads, proved.qk_nope_head_dim, proved.v_head_dim) == (dims.heads, dims.nope, dims.v)
    assert (proved.kv_lora_rank, proved.qk_rope_head_dim) == (dims.rank, dims.rope)
    assert_equal_to_dense(model, converted)
