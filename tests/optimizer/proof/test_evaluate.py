"""Quality figures of examples/tiny-mla against transformers: the same numbers, computed another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from places import TINY
from saved import opened, transformers_model
from torch import Tensor

from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer.indexer_math import SINKS, random_indexer
from mla2dsa.optimizer.indexer.samples import SiteSample
from mla2dsa.optimizer.model.text import load_tokenizer, read_tokens
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.optimizer.proof.evaluate import (
    LayerRecall,
    TextResult,
    layer_recalls,
    on_text,
    program_inputs,
    selection_runners,
)
from mla2dsa.optimizer.proof.figures import Quality
from mla2dsa.optimizer.proof.fp8 import Fp8Scores
from mla2dsa.optimizer.proof.maps import BINS, QUERIES, selection_maps
from mla2dsa.passes.mla_to_dsa import Converted, mla_to_dsa
from mla2dsa.runtime.execute import PieceRunner

CONFIG = IndexerConfig(index_topk=32, index_n_heads=32, index_head_dim=128)  # so many heads leave no ties at zero
LENGTH, TOPK = 160, CONFIG.index_topk


@dataclass(frozen=True)
class Case:
    """The dense model in our form and in transformers', some held-out text, and untrained indexers."""

    source: WeightSource
    converted: Converted
    indexers: dict[str, IndexerWeights]
    sequences: list[Tensor]
    model: Any

    @property
    def dense(self) -> PieceRunner:
        program = self.source.capture.program
        return PieceRunner(program, self.source.loader(program), [change.before for change in self.converted.changes])

    def selections(self) -> dict[str, PieceRunner]:
        source = WeightSource(self.source.checkpoint, self.source.capture, indexers=self.indexers)
        cores = [change.after for change in self.converted.changes]
        return selection_runners(self.converted.program, source.loader(self.converted.program), cores)


@pytest.fixture(scope="module")
def case() -> Case:
    source = opened(TINY)
    converted = mla_to_dsa(source.capture.program, CONFIG)
    indexers = {change.name: rounded(random_indexer(CONFIG, 192, 96, i)) for i, change in enumerate(converted.changes)}
    text = read_tokens(TINY / "held_out", load_tokenizer(TINY))
    return Case(source, converted, indexers, text.sequences(LENGTH, 3), transformers_model(TINY))


def rounded(weights: IndexerWeights) -> IndexerWeights:
    """What a bfloat16 checkpoint can hold."""
    return IndexerWeights.from_tensors({n: t.to(torch.bfloat16).float() for n, t in weights.tensors().items()})


@pytest.fixture(scope="module")
def result(case: Case) -> TextResult:
    return on_text(case.dense, case.selections(), case.sequences, TOPK)


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """[L - 1 - index_topk, vocab] of a transformers model, after more than index_topk tokens."""
    logits: Tensor = model(ids[None], **options).logits
    return torch.log_softmax(logits[0, TOPK:-1].double(), -1)


def quality(dense: Tensor, sparse: Tensor, targets: Tensor) -> Quality:
    """dense, sparse: [N, vocab] log probabilities, written out."""
    delta = (dense - sparse).gather(1, targets[:, None])[:, 0]
    kl = F.kl_div(sparse, dense, log_target=True, reduction="none").sum(-1)
    means = delta.view(3, -1).mean(-1)  # of the three sequences
    error = ((means - means.mean()) ** 2).sum() / 2 / 3
    same = (dense.argmax(-1) == sparse.argmax(-1)).double()
    return Quality(float(delta.mean()), float(error.sqrt()), float(kl.mean()), float(same.mean()))


def expected(case: Case, sparse: Callable[[Tensor], Tensor]) -> Quality:
    dense = torch.cat([log_probabilities(case.model, ids) for ids in case.sequences])
    other = torch.cat([sparse(ids) for ids in case.sequences])
    return quality(dense, other, torch.cat([ids[TOPK + 1 :] for ids in case.sequences]))


def assert_quality(got: Quality, wanted: Quality) -> None:
    assert got.loss_delta == pytest.approx(wanted.loss_delta, abs=1e-5)
    assert got.standard_error == pytest.approx(wanted.standard_error, rel=1e-4)
    assert got.kl == pytest.approx(wanted.kl, rel=1e-4)
    assert got.same_top == pytest.approx(wanted.same_top, abs=1e-6)


# The text


def test_dense_loss_is_transformers(case: Case, result: TextResult) -> None:
    losses = [F.nll_loss(log_probabilities(case.model, ids), ids[TOPK + 1 :]) for ids in case.sequences]
    assert result.dense_loss == pytest.approx(float(sum(losses)) / len(losses), abs=1e-5)
    assert (result.positions, result.length) == (len(case.sequences) * (LENGTH - TOPK - 1), LENGTH)


def test_window_is_transformers_with_that_mask(case: Case, result: TextResult) -> None:
    i = torch.arange(LENGTH)
    visible = (i <= i[:, None]) & ((i < SINKS) | (i > i[:, None] - (TOPK - SINKS)))
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~visible, torch.finfo(torch.float32).min)
    wanted = expected(case, lambda ids: log_probabilities(case.model, ids, attention_mask=mask))
    assert wanted.kl > 0.05
    assert_quality(result.by_selection["window"], wanted)


def test_dsa_is_transformers_deepseek_v32(case: Case, result: TextResult, tmp_path: Path) -> None:
    out = tmp_path / "dsa"
    write_dsa_checkpoint(TINY, out, case.indexers, CONFIG, manifest={})
    model = transformers_model(out)
    assert type(model).__name__ == "DeepseekV32ForCausalLM"
    wanted = expected(case, lambda ids: log_probabilities(model, ids))
    assert wanted.kl > 0.05
    assert_quality(result.by_selection["dsa"], wanted)


def test_the_worst_sequence_is_the_one_with_the_largest_loss(case: Case, result: TextResult) -> None:
    found = result.by_selection["window"]
    worst = found.worst
    assert worst is not None
    assert worst.loss_delta == max(found.sequence_deltas) == found.sequence_deltas[worst.sequence]
    ids = case.sequences[worst.sequence].tolist()
    assert list(worst.tokens) == ids[worst.position + 1 - len(worst.tokens) : worst.position + 1]
    assert found.ppl_ratio == pytest.approx(math.exp(found.loss_delta))


def test_scores_in_fp8_beside_float(case: Case) -> None:
    """e4m3 has three bits after the point: most keys are the same, not all."""
    scores = Fp8Scores()
    source = WeightSource(case.source.checkpoint, case.source.capture, indexers=case.indexers)
    load, cores = source.loader(case.converted.program), [change.after for change in case.converted.changes]
    runners = selection_runners(case.converted.program, load, cores, fp8=scores)
    both = {name: runners[name] for name in ("dsa", "dsa-fp8")}
    found = on_text(case.dense, both, case.sequences[:1], TOPK).by_selection
    assert 0.9 < scores.same < 1
    assert 0 < abs(found["dsa"].kl - found["dsa-fp8"].kl) < 0.2 * found["dsa"].kl


def test_the_oracle_beats_a_window_and_a_window_beats_an_untrained_indexer(result: TextResult) -> None:
    oracle, window, dsa = (result.by_selection[name] for name in ("oracle", "window", "dsa"))
    assert oracle.kl < window.kl < dsa.kl
    assert oracle.loss_delta < window.loss_delta < dsa.loss_delta


def test_dense_against_itself_is_no_difference(case: Case) -> None:
    same = on_text(case.dense, {"dense": case.dense}, case.sequences[:2], TOPK).by_selection["dense"]
    assert (same.loss_delta, same.standard_error, same.same_top) == (0.0, 0.0, 1.0)
    assert same.kl == pytest.approx(0.0, abs=1e-9)


def test_progress_and_sequences_of_one_position(case: Case) -> None:
    seen: list[tuple[int, int]] = []
    short = [ids[: TOPK + 2] for ids in case.sequences[:2]]
    result = on_text(case.dense, {}, short, TOPK, on_sequence=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert result.positions == 2


def test_one_sequence_has_no_standard_error(case: Case) -> None:
    only = on_text(case.dense, {"dense": case.dense}, [case.sequences[0][: TOPK + 2]], TOPK)
    found = only.by_selection["dense"]
    assert all(error != error for error in (found.standard_error, found.kl_error, found.position_error))


def test_program_inputs() -> None:
    batch = program_inputs(torch.tensor([5, 6, 7]))
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2]]


# The layers


def test_recalls_are_of_transformers_attention(case: Case) -> None:
    """Oracle and window from transformers' attention weights, at every row that has a choice."""
    found = layer_recalls(case.source, case.indexers, CONFIG, case.sequences, rows=LENGTH - TOPK)
    with torch.no_grad():
        seen = [case.model(ids[None], output_attentions=True).attentions for ids in case.sequences]
    assert [recall.name for recall in found] == [f"model.layers.{i}.self_attn" for i in range(4)]
    for layer, recall in enumerate(found):
        mass = torch.cat([attentions[layer][0].mean(0)[TOPK:] for attentions in seen])
        position = torch.arange(TOPK, LENGTH).repeat(len(seen))[:, None]
        key = torch.arange(LENGTH)
        window = (key < SINKS) | (key > position - (TOPK - SINKS))
        assert recall.oracle == pytest.approx(float(mass.topk(TOPK).values.sum(-1).mean()), abs=1e-5)
        assert recall.window == pytest.approx(float((mass * window).sum(-1).mean()), abs=1e-5)
        assert recall.dsa < recall.oracle
        assert recall.few_positive < 1


def test_recalls_of_a_known_indexer(case: Case) -> None:
    """Constant scores: all ties, so the first index_topk keys."""
    blank = {
        name: IndexerWeights.from_tensors({n: torch.zeros_like(t) for n, t in weights.tensors().items()})
        for name, weights in case.indexers.items()
    }
    found: list[LayerRecall] = layer_recalls(case.source, blank, CONFIG, case.sequences, rows=LENGTH - TOPK)
    with torch.no_grad():
        seen = [case.model(ids[None], output_attentions=True).attentions for ids in case.sequences]
    for layer, recall in enumerate(found):
        mass = torch.cat([attentions[layer][0].mean(0)[TOPK:, :TOPK] for attentions in seen])
        assert recall.dsa == pytest.approx(float(mass.sum(-1).mean()), abs=1e-5)
        assert recall.few_positive == 1
        assert [one.position for one in recall.maps] == sorted({one.position for one in recall.maps})
        assert len(recall.maps) == QUERIES
        assert recall.maps[-1].position == LENGTH - 1
        for one in recall.maps:
            keys, own = one.position + 1, seen[0][layer][0].mean(0)[one.position, : one.position + 1]
            assert one.dsa == stretches(range(TOPK), keys)
            wanted = stretches(own.topk(TOPK).indices.tolist(), keys)
            assert (
                sum(abs(a - b) for a, b in zip(one.oracle, wanted, strict=True)) <= 2
            )  # one key that is as good as another
            assert sum(one.oracle) == TOPK


def stretches(chosen: Iterable[int], keys: int) -> tuple[int, ...]:
    """How many of `chosen` are in every one of BINS equal parts of 0..keys."""
    places = [key * BINS // keys for key in chosen]
    return tuple(places.count(part) for part in range(BINS))


def test_no_map_where_no_query_has_a_choice() -> None:
    empty = torch.empty(0)
    rows = torch.arange(TOPK)
    sample = SiteSample(empty, empty, empty, empty, rows, empty, empty, torch.empty(TOPK, TOPK))
    assert selection_maps(torch.zeros(TOPK, TOPK, dtype=torch.int32), TOPK, sample) == ()
