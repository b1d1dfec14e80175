"""find_mla on hand-written attentions that look like MLA and are not: each is refused, with its reason and the node to blame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handwritten import Mla, build, export
from refused_variants import (
    Alibi,
    BiasedUp,
    Bidirectional,
    ByActivation,
    ByPosition,
    Chunked64,
    Eager,
    EagerDropout,
    FarTokenShift,
    FlashOp,
    FlattenedTokens,
    Gqa,
    GroupedSdpa,
    HalfAdded,
    HalfFilled,
    HalfRotated,
    HiddenWrittenBetween,
    HidesToken7,
    InChunksOf8,
    InsideCond,
    KPeInTheMiddle,
    KPeNormed,
    KPePerHead,
    KPeProjectedApart,
    LongerKeys,
    NoMask,
    NormedKeys,
    PrefixLm,
    ProbabilitiesRead,
    ScaledAfterMask,
    ScaledValues,
    SdpaDropout,
    SeparateUp,
    Sliding3,
    Sliding512,
    Sliding16384,
    SlidingByDivision,
    SlidingByLogarithm,
    SlidingTriangles,
    SoftCapped,
    SoftmaxOverQueries,
    Strided,
    TokenShift,
    TwoHiddenStates,
    WeakMask,
    WindowInBuffer,
    WindowInTable,
    WindowInTensor,
    WithSink,
)
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.passes.find_mla import find_mla
from mla2dsa.passes.mla_to_dsa import mla_to_dsa

CONFIG = IndexerConfig(index_topk=64, index_n_heads=2, index_head_dim=8)

SHARED = "do not share one up-projection"
REFUSED: list[tuple[type[Mla], str, str]] = [  # attention, reason, op of the node to blame
    (Gqa, SHARED, "cat"),
    (GroupedSdpa, "queries have 4 heads of 12, keys 2 of 12", "cat"),
    (SeparateUp, SHARED, "cat"),
    (BiasedUp, "up-projection has a bias", "linear"),
    (NormedKeys, SHARED, "cat"),
    (ScaledValues, "values are not one projection's output", "mul"),
    (KPePerHead, "k_pe is not one key shared by all heads", "cat"),
    (KPeProjectedApart, "the latent and k_pe come from different projections", "cat"),
    (KPeNormed, "k_pe is not a selection of the projection's rows", "cat"),
    (KPeInTheMiddle, "k_pe's channels are not at one end", "cat"),
    (HalfRotated, "k_pe", "cat"),
    (TokenShift, "keys mix tokens", "cat"),
    (FarTokenShift, "keys mix tokens", "cat"),
    (FlattenedTokens, "no single dynamic token axis", "linear"),
    (LongerKeys, "capture without a cache", "cat"),
    (TwoHiddenStates, "queries and latent do not start at the same hidden state", "cat"),
    (HiddenWrittenBetween, "the in-place write add_ (aten.add_.Tensor) reaches the attention", "add_"),
    (Sliding3, "not causal plus key padding: it differs at batch", "and"),
    (Sliding512, "it differs at batch 1, length 517", "and"),
    (Sliding16384, "reaches 16384 tokens: too long to probe", "and"),
    (SlidingByDivision, "it differs at batch 1, length 517", "and"),
    (SlidingByLogarithm, "the mask is computed with aten.log2", "log2"),
    (SlidingTriangles, "it differs at batch 1, length 105", "and"),
    (WindowInTensor, "it differs at batch 1, length 305", "and"),
    (WindowInTable, "it differs at batch 1, length 605", "and"),
    (WindowInBuffer, "depends on activations or weights", "and"),
    (Chunked64, "it differs at batch 1, length 133", "and"),
    (Strided, "it differs at batch", "and"),
    (HidesToken7, "it differs at batch", "and"),
    (ByPosition, "the mask depends on positions", "and"),
    (ByActivation, "the mask depends on activations or weights", "and"),
    (Bidirectional, "it differs at batch", "expand"),
    (NoMask, "no mask and not causal: bidirectional", "scaled_dot_product_attention"),
    (PrefixLm, "it differs at batch", "or"),
    (Alibi, "the additive mask carries a bias", "where"),
    (InChunksOf8, "it cannot be evaluated", "and"),
    (SoftmaxOverQueries, "softmax is not over the keys", "softmax"),
    (ScaledAfterMask, "scaled after the mask", "masked_fill"),
    (WeakMask, "pass through aten.masked_fill", "masked_fill"),
    (HalfAdded, "pass through aten.add", "add"),
    (SoftCapped, "pass through aten.tanh", "tanh"),
    (WithSink, "softmax over tokens is followed by aten.slice", "slice"),
    (ProbabilitiesRead, "the attention probabilities have another reader", "softmax"),
    (EagerDropout, "attention dropout is on", "dropout"),
    (SdpaDropout, "attention dropout is on", "scaled_dot_product_attention"),
    (FlashOp, "is not one this pass reads", "_scaled_dot_product_flash_attention_for_cpu"),
    (InsideCond, "attention stands in a nested graph (cond)", "true_graph_0"),
]
LENGTH = {FarTokenShift: 80, InChunksOf8: 16}


@pytest.mark.parametrize(("attention", "reason", "blamed"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_not_mla_is_refused(attention: type[Mla], reason: str, blamed: str) -> None:
    program = export(build(attention), length=LENGTH.get(attention, 7))
    found = find_mla(program)
    assert not found.sites
    (miss,) = found.misses
    assert (miss.name, miss.index) == ("self_attn", 0)
    assert reason in miss.reason
    (node,) = [node for node in program.graph.nodes if node.name == miss.node]
    assert blamed in str(node.target).removeprefix("aten.")


@pytest.mark.parametrize(
    ("attention", "reason"),
    [(Sliding3, "not causal"), (HiddenWrittenBetween, "same hidden state"), (HalfFilled, "never filled")],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_nothing_is_converted(attention: type[Mla], reason: str) -> None:
    """In-place writes are functionalised first, and what is left is judged."""
    with pytest.raises(
        UserError, match=rf"no dense MLA attention in this model; self_attn: .*{reason}.* \(node \w+\)$"
    ):
        mla_to_dsa(export(build(attention)), CONFIG)


@pytest.mark.parametrize("attention", [Mla, Eager], ids=lambda a: a.__name__)
def test_a_static_sequence_is_refused(attention: type[Mla]) -> None:
    (miss,) = find_mla(export(build(attention), dynamic=False)).misses
    assert "no single dynamic token axis: export with a dynamic sequence" in miss.reason


def test_an_in_place_write_is_named_before_anything_is_read() -> None:
    class WrittenMask(Mla):
        def visible(self, mask: Tensor, pos: Tensor) -> Tensor:
            seen = super().visible(mask, pos)
            seen &= mask.bool()[:, None, None]
            return seen

    (miss,) = find_mla(export(build(WrittenMask))).misses
    assert "the in-place write iand (aten.__iand__.Tensor) reaches the attention: functionalise" in miss.reason


def test_a_softmax_over_channels_is_no_attention() -> None:
    """Routers and gates do not count as cores."""

    class Gated(Mla):
        def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Any:
            return super().forward(x, mask, pos) * torch.softmax(x, -1)

    found = find_mla(export(build(Gated)))
    assert (len(found.sites), len(found.misses)) == (1, 0)
