"""Attentions that write in place, from end to end: converted to the same values, or refused; never anything in between."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from families import indexer_weights
from handwritten import Mla, Model, build, export, inputs
from writing_variants import (
    BranchWritesAfter,
    ComplexInPlace,
    CountsCalls,
    EagerInPlace,
    HiddenWrittenAfter,
    JoinedKeys,
    KeysComplex,
    KeysDiagonal,
    KeysDropout,
    KeysEinsum,
    KeysForeach,
    KeysIndexPut,
    KeysOut,
    KeysUnfolded,
    LatentWrittenBefore,
    MaskAndOut,
    MaskDiagonal,
    MaskDiagonalKept,
    MaskIndexPut,
    MaskInputWritten,
    MaskScatter,
    MaskStrided,
    MaskWrittenAfter,
    NarrowedKeys,
    NormInPlace,
    OperandsWritten,
    OutStrided,
    OutStridedCopy,
    OutWritten,
    PositionsWritten,
    ProjectedStrided,
    QueriesForeach,
    QueryWritten,
    ScaleWritten,
    ScoresWritten,
    SiblingWritten,
    SlowAndUntold,
    SplitKeys,
    StatisticsAfter,
    ViewedTwiceKeys,
)

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.passes.find_mla import find_mla
from mla2dsa.passes.matching.writes import FUNCTIONALISE
from mla2dsa.passes.mla_to_dsa import Converted, mla_to_dsa
from mla2dsa.passes.tap import ROWS_INPUT, tap

ATTENTION = "self_attn"
CONFIG = IndexerConfig(index_topk=64, index_n_heads=2, index_head_dim=8)
SHAPES = [(2, 7, 0, 0), (3, 9, 2, 1), (1, 5, 0, 0)]  # batch, length, padding on the left and on the right


def convert(model: Model) -> Converted:
    d = model.self_attn.d
    return mla_to_dsa(export(model), CONFIG, {ATTENTION: indexer_weights(CONFIG, d.hidden, d.q_rank)})


def assert_equal_to_dense(model: Model, converted: Converted) -> None:
    """Twice in a row, for a program may write to its own buffers, and to its inputs; to rounding, since index_topk exceeds every length."""
    for batch, length, left, right in SHAPES:
        dense, rewritten = copy.deepcopy(model), copy.deepcopy(converted.program).module()
        args = inputs(model, batch, length, left, right)
        real = args[1].bool()
        for _ in range(2):
            given, again = ([arg.clone() for arg in args] for _ in range(2))
            with torch.no_grad():
                expected, got = dense(*given)[real], rewritten(*again)[real]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
            torch.testing.assert_close(again, given)
        for name, buffer in dense.named_buffers():
            torch.testing.assert_close(dict(rewritten.named_buffers())[name], buffer)


REACHING = [
    NarrowedKeys, SplitKeys, ViewedTwiceKeys, JoinedKeys, ComplexInPlace, PositionsWritten, MaskDiagonalKept, MaskAndOut,
    MaskIndexPut, MaskScatter, EagerInPlace, NormInPlace, LatentWrittenBefore, QueryWritten, QueriesForeach, SiblingWritten,
    ScaleWritten, MaskInputWritten,
]  # fmt: skip
HARMLESS = [
    OutWritten, OperandsWritten, MaskWrittenAfter, HiddenWrittenAfter, CountsCalls, BranchWritesAfter, StatisticsAfter,
    ProjectedStrided,
]  # fmt: skip


@pytest.mark.parametrize("attention", REACHING, ids=lambda a: a.__name__)
def test_a_write_that_reaches_an_mla_attention_is_functionalised(attention: type[Mla]) -> None:
    model = build(attention)
    converted = convert(model)
    assert converted.functionalised
    assert_equal_to_dense(model, converted)


@pytest.mark.parametrize("attention", HARMLESS, ids=lambda a: a.__name__)
def test_a_write_that_attention_does_not_see_costs_nothing(attention: type[Mla]) -> None:
    model = build(attention)
    converted = convert(model)
    assert not converted.functionalised
    assert_equal_to_dense(model, converted)


NOT_MLA = [
    (MaskDiagonal, "the mask is not causal plus key padding: it differs at batch 2"),
    (MaskStrided, "the mask is not causal plus key padding: it differs at batch 2"),
    (ScoresWritten, "attention scores pass through aten.slice_scatter"),
    (KeysDiagonal, "keys and values do not share one up-projection"),
    (KeysComplex, "keys and values do not share one up-projection"),
    (KeysOut, "keys and values do not share one up-projection"),
    (KeysForeach, "keys have 3 parts that do not come from the latent"),
    (KeysUnfolded, "keys and values do not share one up-projection"),
    (KeysIndexPut, "keys and values do not share one up-projection"),
]


@pytest.mark.parametrize(("attention", "reason"), NOT_MLA, ids=lambda x: getattr(x, "__name__", ""))
def test_what_a_write_makes_of_an_attention_is_judged(attention: type[Mla], reason: str) -> None:
    program = export(build(attention))
    (miss,) = find_mla(program).misses
    assert miss.reason.startswith("the in-place write ")
    assert miss.reason.endswith(f" reaches the attention: {FUNCTIONALISE}")
    with pytest.raises(UserError, match=reason):
        mla_to_dsa(program, CONFIG)


@pytest.mark.parametrize(
    ("attention", "op"),
    [(KeysEinsum, "aten.einsum.default"), (KeysDropout, "aten.dropout.default")],
    ids=["einsum", "dropout"],
)
def test_a_write_that_torch_would_lose_is_refused(attention: type[Mla], op: str) -> None:
    """The op it passes through is named; functionalising such a program gives other values."""
    model = build(attention)
    program = export(model)
    args = inputs(model, 2, 7)
    with torch.no_grad():
        lost = program.run_decompositions({}).module()(*args) - model(*args)
    assert lost.abs().max() > 1e-3, f"this torch functionalises {op}: it need not be refused"
    with pytest.raises(
        UserError, match=rf"the in-place write mul_ \(aten.mul_.Tensor\), through \w+ \({op}\), .*: write out of place"
    ):
        mla_to_dsa(program, CONFIG)


def test_a_program_that_cannot_be_functionalised_is_not() -> None:
    with pytest.raises(
        UserError, match=r"logical_and.out.*but the in-place write mul_ .* \(aten.dropout.default\)"
    ) as refused:
        mla_to_dsa(export(build(SlowAndUntold)), CONFIG)
    assert str(refused.value).endswith("would be lost then: write out of place, or into a clone")


def test_taps_are_what_attention_read() -> None:
    """Not what was written there later: here the residual, in place."""
    model = build(HiddenWrittenAfter)
    x, mask, pos = inputs(model, 2, 7)
    tapped = tap(export(model), rows=2)
    with torch.no_grad():
        out, taps = tapped.program.module()(x, mask, pos, **{ROWS_INPUT: torch.tensor([1, 4])})
        torch.testing.assert_close(out, model(x, mask, pos))
    torch.testing.assert_close(taps[f"{ATTENTION}.hidden"], x * 1.5)


@pytest.mark.parametrize("attention", [OutStrided, OutStridedCopy], ids=lambda a: a.__name__)
def test_who_reads_the_memory_layout_of_an_attention_is_refused(attention: type[Mla]) -> None:
    (miss,) = find_mla(export(build(attention))).misses
    assert re.fullmatch(
        r"as_strided(_copy)? \(aten.as_strided(_copy)?.default\) reads the memory layout of what the attention gives: index by dimensions",
        miss.reason,
    )
