"""absorb: one key row per token and one query row per head give the scores and values of the expanded attention."""

from __future__ import annotations

import functools

import pytest
import torch
from handwritten import Dims, Mla, NoPe, build, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_variants import ChannelsFirst, HeadsInPairs, PartsFirst, PeFirst, ShiftedHeads, SpareHead
from site_graphs import built, site_in, with_built
from torch import Tensor
from torch.fx import GraphModule, Node

from mla2dsa.passes.building.absorb import key_range, key_rows, key_up, query_rows, value_heads, value_up
from mla2dsa.passes.graph.editor import GraphBuilder
from mla2dsa.passes.graph.graph_eval import value
from mla2dsa.passes.matching.sites import MlaSite

aten = torch.ops.aten
LAYOUTS = [Mla, NoPe, PeFirst, PartsFirst, ChannelsFirst, ShiftedHeads, SpareHead, HeadsInPairs]
VIEWS = {Mla, NoPe, PeFirst}  # kv_b rows as [head][nope | v]


def everything(b: GraphBuilder, site: MlaSite) -> dict[str, Node]:
    keys = key_rows(b, site)
    latent = b(aten.slice.Tensor, keys, -1, 0, site.dims.kv_lora_rank)
    heads = b.size(site.core.q, 1)
    attended = b(
        aten.expand.default, b(aten.unsqueeze.default, latent, 2), [-1, -1, heads, -1]
    )  # each token sees itself
    return {
        "q": site.core.q, "k": site.core.k, "v": site.core.v, "queries": query_rows(b, site, site.core.q), "keys": keys,
        "values": value_heads(b, site, attended), "uk": key_up(b, site), "uv": value_up(b, site), "latent": site.latent,
    }  # fmt: skip


def assert_absorbed(attention: type[Mla], dims: Dims, batch: int, length: int) -> None:
    model = build(attention, dims)
    got = built(model, everything, *inputs(model, batch, length, left=length // 3))
    assert got["queries"].shape == (batch, length, dims.heads, dims.rank + dims.rope)
    assert got["keys"].shape == (batch, length, dims.rank + dims.rope)
    scores = torch.einsum("bthc,bsc->bhts", got["queries"], got["keys"])
    torch.testing.assert_close(scores, got["q"] @ got["k"].mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(got["values"], got["v"], rtol=0, atol=1e-10)
    latent = got["latent"].reshape(batch, length, -1)
    rope_first = attention is PeFirst
    nope = got["k"][..., dims.rope :] if rope_first else got["k"][..., : dims.nope]
    torch.testing.assert_close(torch.einsum("hnr,bsr->bhsn", got["uk"], latent), nope, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.einsum("hvr,bsr->bhsv", got["uv"], latent), got["v"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", LAYOUTS, ids=lambda a: a.__name__)
def test_scores_and_values_are_those_of_the_expanded_attention(attention: type[Mla]) -> None:
    assert_absorbed(attention, Dims(), 3, 7)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    dims=st.builds(
        Dims, st.sampled_from([2, 4]), st.integers(1, 5), st.sampled_from([2, 4, 6]), st.integers(1, 5), st.integers(2, 9)
    ),
    attention=st.sampled_from(LAYOUTS),
    length=st.integers(1, 9),
)  # fmt: skip
def test_at_any_sizes(dims: Dims, attention: type[Mla], length: int) -> None:
    assert_absorbed(attention, dims, 2, length)


@pytest.mark.parametrize("attention", LAYOUTS, ids=lambda a: a.__name__)
def test_the_weight_is_copied_only_where_its_rows_are_out_of_order(attention: type[Mla]) -> None:
    program = with_built(build(attention), lambda b, site: {"uk": key_up(b, site), "uv": value_up(b, site)})
    picks = [n for n in program.graph.nodes if n.target is aten.index_select.default]
    assert bool(picks) is (attention not in VIEWS)
    assert set(program.state_dict) == {f"self_attn.{name}" for name, _ in attention(Dims()).named_parameters()}
    constants = {name for name in program.constants if "rows" in name}
    assert constants <= {"self_attn.uk_rows", "self_attn.uv_rows"}
    assert len(constants) == len(picks)


# Ranges


def ranges(b: GraphBuilder, site: MlaSite) -> dict[str, Node]:
    return dict(zip(("begin", "end"), key_range(b, site), strict=True))


@functools.cache
def ranges_program() -> GraphModule:
    return with_built(build(Mla), ranges).module()


def ranges_of(*args: Tensor) -> dict[str, Tensor]:
    result: dict[str, Tensor] = ranges_program()(*args)[1]
    return result


@settings(max_examples=20, deadline=None, derandomize=True)
@given(length=st.integers(1, 9), data=st.data())
def test_a_range_holds_the_keys_that_the_mask_shows(length: int, data: st.DataObject) -> None:
    model = build(Mla)
    left, right = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, length - 1))
    args = inputs(model, 2, length, left, right)
    keep = args[1].bool()
    got = ranges_of(*args)
    slots = torch.arange(length)
    inside = (slots >= got["begin"][..., None]) & (slots < got["end"][..., None])
    real = keep[:, :, None]
    shown = (slots[None] <= slots[:, None])[None] & keep[:, None]
    assert torch.equal(inside & real, shown & real)


def test_ranges_are_whole_numbers_per_query() -> None:
    model = build(Mla)
    args = inputs(model, 2, 5, left=2, right=1)
    got = ranges_of(*args)
    assert (got["begin"].dtype, got["end"].dtype) == (torch.int64, torch.int64)
    assert got["begin"].tolist() == [[2] * 5, [0] * 5]
    assert got["end"].tolist() == [[1, 2, 3, 4, 5]] * 2


def test_a_row_of_nothing_but_padding_has_a_range() -> None:
    args = inputs(build(Mla), 2, 4, left=4)
    assert ranges_of(*args)["begin"].tolist() == [[0] * 4] * 2


def test_without_padding_a_range_begins_at_the_first_key() -> None:
    class Unpadded(Mla):
        def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
            return torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()

    model = build(Unpadded)
    got = built(model, ranges, *inputs(model, 2, 4, left=2))
    assert got["begin"].tolist() == [[0] * 4] * 2
    assert got["end"].tolist() == [[1, 2, 3, 4]] * 2


def test_built_nodes_have_the_shapes_they_say() -> None:
    editor, site = site_in(build(Mla))
    b = editor.builder(before=site.core.out)
    rows = value(key_rows(b, site)).shape
    assert list(map(str, rows[:2])) == list(map(str, value(site.hidden).shape[:2]))
    assert rows[2] == site.dims.kv_lora_rank + site.dims.qk_rope_head_dim
