"""Head weights of the closed form: a constant read off the hidden state, above zero on every token that can be asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mla_layer import make_layer
from torch import Tensor

from mla2dsa.optimizer.indexer import head_weights
from mla2dsa.optimizer.indexer.head_weights import constant_one, negative_share
from mla2dsa.optimizer.indexer.samples import SiteSample

TOKENS, HIDDEN = 150, 64


def samples_of(embeddings: Tensor, *tokens: Tensor) -> list[SiteSample]:
    """Hidden states that are embeddings and nothing else, as in a first layer."""
    layer = make_layer()
    return [replace(layer.sample(0, length=len(ids)), hidden=embeddings[ids]) for ids in tokens]


@pytest.fixture(scope="module")
def embeddings() -> Tensor:
    """Common tokens lie to one side; a few that the text never shows lie nearly opposite, though some plane still parts all
    from zero."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(TOKENS, HIDDEN, generator=generator)
    table[:, 0] = 1.0
    table[-10:, 0] = -0.5
    table[-10:, 1] = 3.0
    return table


def text(embeddings: Tensor) -> list[SiteSample]:
    generator = torch.Generator().manual_seed(1)
    return samples_of(embeddings, *torch.randint(0, TOKENS - 10, (4, 200), generator=generator))


def test_signs_are_mended_on_tokens_that_the_text_never_shows(embeddings: Tensor) -> None:
    vocabulary = samples_of(embeddings, torch.randperm(TOKENS))
    blind, seen = constant_one(text(embeddings)), constant_one(text(embeddings), vocabulary)
    assert blind.negative == 0  # on what it has seen
    assert negative_share(blind.v, vocabulary) >= 5 / TOKENS
    assert seen.negative == negative_share(seen.v, vocabulary) == 0
    read = torch.cat([sample.hidden for sample in text(embeddings)]).double() @ seen.v
    assert read.mean() == pytest.approx(1, abs=0.3)


def test_signs_that_no_plane_can_part_are_counted(embeddings: Tensor) -> None:
    """A token and its opposite: one of the two is below zero, whatever v is."""
    torn = embeddings.clone()
    torn[-1] = -torn[0]
    vocabulary = samples_of(torn, torch.randperm(TOKENS))
    found = constant_one(text(torn), vocabulary)
    assert found.negative == negative_share(found.v, vocabulary) == pytest.approx(1 / TOKENS)


def test_mending_takes_no_more_rounds_than_it_may(embeddings: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_weights, "MEND_ROUNDS", 0)
    vocabulary = samples_of(embeddings, torch.randperm(TOKENS))
    assert constant_one(text(embeddings), vocabulary).negative > 0


@pytest.mark.parametrize(("name", "value"), [("ONE_TOKENS", 8), ("MOST_MENDED", 7)], ids=["at-once", "in-all"])
def test_no_more_are_mended_than_are_few(
    name: str, value: int, embeddings: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = samples_of(embeddings, torch.randperm(TOKENS))
    monkeypatch.setattr(head_weights, name, value)
    assert constant_one(text(embeddings), vocabulary).negative > 0
    monkeypatch.undo()
    assert constant_one(text(embeddings), vocabulary).negative == 0


def test_shares_are_of_all_tokens(embeddings: Tensor) -> None:
    total = torch.zeros(HIDDEN).index_fill(0, torch.tensor([0]), 1.0)
    parts = samples_of(embeddings, torch.arange(TOKENS - 20, TOKENS), torch.arange(30))
    assert negative_share(total, parts) == pytest.approx(10 / 50)
    assert negative_share(total, []) == 0
