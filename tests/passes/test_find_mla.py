"""find_mla on hand-written attentions that are MLA, however they are spelled; what it must refuse is in the next file."""

from __future__ import annotations

import pytest
import torch
from families import indexer_weights
from handwritten import SCALE, Dims, Mla, Model, NoPe, build, export, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mla_variants import (
    MLA,
    ChannelsFirst,
    ComplexRope,
    FullTableRope,
    InterleavedRope,
    MaskedFill,
    MaskWrittenInPlace,
    NoQueryLatent,
    PeFirst,
)
from torch import Tensor

from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.passes.matching.sites import MlaSite
from mla2dsa.passes.mla_to_dsa import Converted, mla_to_dsa, prepare

CONFIG = IndexerConfig(index_topk=64, index_n_heads=2, index_head_dim=8)
SHAPES = [(2, 7, 0, 0), (3, 33, 5, 0), (2, 12, 0, 3), (1, 1, 0, 0)]  # batch, length, left padding, right padding


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
