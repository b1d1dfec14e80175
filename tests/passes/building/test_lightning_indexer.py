"""select: the slots are those of the formula, computed here in a few plain lines, whatever the model's rotary table is like."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import indexer_weights
from handwritten import Dims, Mla, Model, NoPe, build, export, inputs
from mla_variants import ComplexRope, FullTableRope, InterleavedRope, NoQueryLatent
from site_graphs import built, site_in, with_built
from torch import Tensor
from torch.fx import Node

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.passes.building.absorb import key_range
from mla2dsa.passes.building.lightning_indexer import rotary_table, select
from mla2dsa.passes.graph.editor import GraphBuilder
from mla2dsa.passes.graph.graph_eval import value
from mla2dsa.passes.matching.sites import MlaSite
from mla2dsa.passes.mla_to_dsa import prepare

TOPK, HEADS, WIDTH = 3, 4, 10
BATCH, LENGTH, LEFT = 2, 9, 2


def turned(x: Tensor, angles: Tensor, interleave: bool) -> Tensor:
    """The first channels of x [..., T, d] as complex numbers, times e^(i angle)."""
    pairs = angles.shape[-1]
    x = x.clone()
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleave else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    z = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angles), angles)
    x[..., first], x[..., second] = z.real, z.imag
    return x


def by_the_formula(
    model: Model, weights: IndexerWeights, args: tuple[Tensor, ...], interleave: bool
) -> list[list[set[int]]]:
    """Per row and query, the slots of the TOPK best visible keys."""
    x, keep, pos = args
    attention = model.self_attn
    q_resid = attention.latents(x)[0]
    d = attention.d
    steps = torch.arange(1, d.rope // 2 + 1).double()
    angles = pos.double()[..., None] / steps
    if isinstance(attention, NoPe):
        angles = angles * 0
    w = {name: tensor.double() for name, tensor in weights.tensors().items()}
    q = (q_resid @ w["wq_b.weight"].T).view(BATCH, LENGTH, HEADS, WIDTH)
    k = F.layer_norm(x @ w["wk.weight"].T, (WIDTH,), w["k_norm.weight"], w["k_norm.bias"], 1e-6)
    q, k = turned(q, angles[:, :, None], interleave), turned(k, angles, interleave)
    gates = x @ w["weights_proj.weight"].T
    scores = torch.einsum("bth,bths->bts", gates, torch.einsum("bthd,bsd->bths", q, k).relu())
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & keep.bool()[:, None]
    ranked = scores.masked_fill(~visible, float("-inf")).sort(dim=-1, descending=True, stable=True)
    return [
        [{int(s) for s, v in zip(order[:TOPK], best[:TOPK], strict=True) if v > float("-inf")} for order, best in zip(*row, strict=True)]
        for row in zip(ranked.indices, ranked.values, strict=True)
    ]  # fmt: skip


def config(**changes: Any) -> IndexerConfig:
    return IndexerConfig(**{"index_topk": TOPK, "index_n_heads": HEADS, "index_head_dim": WIDTH, **changes})


def weights_for(model: Model) -> IndexerWeights:
    d = model.self_attn.d
    return indexer_weights(config(), d.hidden, d.hidden if isinstance(model.self_attn, NoQueryLatent) else d.q_rank)


def slots(b: GraphBuilder, site: MlaSite, config: IndexerConfig, weights: IndexerWeights | None) -> dict[str, Node]:
    return {"indices": select(b, site, config, weights, key_range(b, site), {})}


@pytest.mark.parametrize("interleave", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize(
    "attention", [Mla, InterleavedRope, FullTableRope, ComplexRope, NoPe, NoQueryLatent], ids=lambda a: a.__name__
)
def test_the_selected_slots_are_those_of_the_formula(attention: type[Mla], interleave: bool) -> None:
    """The rotary layout of the indexer is its own, whatever the model's is."""
    model = build(attention, Dims(rope=6))
    weights, chosen = weights_for(model), config(rope_interleave=interleave)
    args = inputs(model, BATCH, LENGTH, LEFT)
    got = built(model, lambda b, site: slots(b, site, chosen, weights), *args)["indices"]
    assert (got.dtype, tuple(got.shape)) == (torch.int32, (BATCH, LENGTH, TOPK))
    expected = by_the_formula(model, weights, args, interleave)
    for row in range(BATCH):
        for query in range(LENGTH):
            if args[1][row, query]:
                assert {int(s) for s in got[row, query] if s >= 0} == expected[row][query]


def test_a_head_may_be_all_rotary() -> None:
    model = build(Mla, Dims(rope=WIDTH))
    args = inputs(model, BATCH, LENGTH, LEFT)
    got = built(model, lambda b, site: slots(b, site, config(), weights_for(model)), *args)["indices"]
    expected = by_the_formula(model, weights_for(model), args, False)
    assert [{int(s) for s in query if s >= 0} for query in got[1]] == expected[1]


# Parameters


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_parameters_have_the_models_type_but_for_the_head_weights(dtype: torch.dtype) -> None:
    model = build(Mla, dtype=dtype)
    program = with_built(model, lambda b, site: slots(b, site, config(), weights_for(model)))
    held = {n.removeprefix("self_attn.indexer."): t for n, t in program.state_dict.items() if ".indexer." in n}
    d = model.self_attn.d
    assert {n: tuple(t.shape) for n, t in held.items()} == IndexerWeights.shapes(config(), d.hidden, d.q_rank)
    exact = held.pop("weights_proj.weight")
    assert exact.dtype == (dtype if dtype in (torch.float64, torch.float32) else torch.float32)
    assert {t.dtype for t in held.values()} == {dtype}
    given = weights_for(model).tensors()
    assert torch.equal(exact.double(), given["weights_proj.weight"].double())
    assert all(torch.equal(t, given[n].to(dtype)) for n, t in held.items())


def test_without_weights_the_parameters_are_declared_only() -> None:
    program = with_built(build(Mla), lambda b, site: slots(b, site, config(), None))
    declared = {n: t.is_meta for n, t in program.state_dict.items()}
    assert [n for n, meta in declared.items() if meta] == [n for n in declared if ".indexer." in n]
    assert sum(declared.values()) == 5


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(IndexerWeights)])
def test_weights_of_another_shape_are_refused(field: str) -> None:
    model = build(Mla)
    good = weights_for(model)
    bad = dataclasses.replace(good, **{field: getattr(good, field)[:-1]})
    with pytest.raises(UserError, match=r"^self_attn\.indexer\.\S+ is \[[\d, ]+\], expected \[[\d, ]+\]$"):
        with_built(model, lambda b, site: slots(b, site, config(), bad))


def test_a_head_narrower_than_the_rotary_channels_is_refused() -> None:
    model = build(Mla, Dims(rope=12))
    with pytest.raises(
        UserError, match=r"^index_head_dim is 10, expected at least the 12 rotary channels of this model$"
    ):
        with_built(model, lambda b, site: slots(b, site, config(), None))


# The rotary table


def table_of(model: Model, *columns: int) -> dict[str, Any]:
    """cos and sin with other columns than the model's own, and the angles' cosine to compare with."""

    def make(b: GraphBuilder, site: MlaSite) -> dict[str, Node]:
        assert site.rope is not None
        other = dataclasses.replace(site, rope=dataclasses.replace(site.rope, table=columns))
        table = rotary_table(b, other, {})
        assert table is not None
        return dict(zip(("cos", "sin"), table, strict=True))

    return built(model, make, *inputs(model, BATCH, LENGTH))


@pytest.mark.parametrize("columns", [(0, 1, 2, 3), (1, 2), (0, 2), (1, 3), (3,), (0, 3)], ids=str)
def test_columns_of_the_table_are_taken_as_they_were_read(columns: tuple[int, ...]) -> None:
    model = build(Mla, Dims(rope=8))
    got = table_of(model, *columns)
    cos, sin = model.self_attn.table(inputs(model, BATCH, LENGTH)[2], torch.float64)
    assert torch.equal(got["cos"], cos[:, 0, :, list(columns)])
    assert torch.equal(got["sin"], sin[:, 0, :, list(columns)])


@pytest.mark.parametrize("columns", [(0, 1, 3), (0, 0), (2, 1), (1, 1, 1)], ids=str)
def test_columns_that_are_not_evenly_spaced_are_refused(columns: tuple[int, ...]) -> None:
    reason = rf"^self_attn: its rotary table's columns \[{', '.join(map(str, columns))}\] are not evenly spaced"
    with pytest.raises(UserError, match=reason):
        table_of(build(Mla, Dims(rope=8)), *columns)


def test_layers_share_one_table() -> None:
    editor, site = site_in(build(ComplexRope))
    b, shared = editor.builder(before=site.core.out), dict[object, Node]()
    first = rotary_table(b, site, shared)
    count = len(editor.graph.nodes)
    assert rotary_table(b, site, shared) == first
    assert len(editor.graph.nodes) == count


def test_a_site_without_rope_has_no_table() -> None:
    editor, site = site_in(build(NoPe))
    assert rotary_table(editor.builder(before=site.core.out), site, {}) is None


def test_the_table_has_the_models_type() -> None:
    editor, found, _ = prepare(export(build(Mla, dtype=torch.bfloat16)))
    (site,) = found.sites
    table = rotary_table(editor.builder(before=site.core.out), site, {})
    assert table is not None
    assert {value(node).dtype for node in table} == {torch.bfloat16}
