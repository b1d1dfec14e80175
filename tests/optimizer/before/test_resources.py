"""What a conversion will take: the parts of the prediction, how long sequences may be, and when it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import captured_once  # noqa: F401  (a fixture)
from saved import saved

from mla2dsa.errors import UserError
from mla2dsa.optimizer.before import resources as module
from mla2dsa.optimizer.before.resources import STATES, Machine, Resources, refuse_if_too_large, this_machine
from mla2dsa.optimizer.plan import prepare
from mla2dsa.optimizer.recipe import LayerRecipe, Recipe

pytestmark = pytest.mark.usefixtures("captured_once")  # all plans here are of one model
GIB = 2**30
FITS = Resources(8192, 28, {STATES: GIB}, 2**20, 1e12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("deepseek_v3", tmp_path_factory, max_position_embeddings=4096)


def planned(folder: Path, **fields: object) -> Resources:
    return prepare(str(folder), Recipe(index_topk=512, index_n_heads=4, index_head_dim=32, **fields)).plan.resources


def test_the_parts_add_up(folder: Path) -> None:
    found = planned(folder)
    assert found.most >= found.streaming == sum(found.memory.values())
    assert found.sequence_length == 2048
    assert found.sequences == 16 + 4 + 1 + 8  # one goes through the vocabulary
    assert planned(folder) == found  # nothing of the machine is in it
    assert Machine(GIB, 1e11).peak(found) == GIB + module.SLACK + found.most


def test_more_text_takes_more_time_and_no_more_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUDGET", 2**16)
    few, many = planned(folder, tokens=4 * 2048), planned(folder, tokens=64 * 2048)
    assert few.memory["hidden states"] == many.memory["hidden states"] == 2**16
    assert many.disk > 4 * few.disk > 0
    assert many.flops > few.flops


def test_training_takes_more_text_random_tokens_and_time(folder: Path) -> None:
    closed, auto = planned(folder), planned(folder, calibration="text")
    assert auto.sequences == 64 + 21 + 4 + 1 + 1 + 8  # text, random, deciding, random among those, vocabulary, proof
    assert planned(folder, calibration="text", indexer="closed-form").sequences == 16 + 5 + 4 + 1 + 1 + 8
    assert planned(folder, calibration="text", random_share=0).sequences == 64 + 4 + 1 + 8
    steps, tokens, timed = (
        planned(folder, calibration="text", budget=budget) for budget in ("8 steps", f"{8 * 2048} tokens", "10m")
    )
    assert closed.flops < steps.flops == tokens.flops < auto.flops
    assert (timed.seconds, steps.seconds) == (600, 0)
    assert timed.flops < steps.flops
    first = {"layers": {"*.layers.0.*": LayerRecipe(budget="90s")}}
    both, one = (planned(folder, calibration="text", budget=budget, **first) for budget in ("10m", "8 steps"))
    assert (both.seconds, both.flops, one.seconds, one.flops) == (690, timed.flops, 90, steps.flops)
    assert Machine(GIB, 1e11).seconds(timed) == pytest.approx(600 + timed.flops / (1e11 * module.SHARE_OF_RATE))


@pytest.mark.parametrize(("vocabulary", "count"), [(100, 1), (128, 1), (129, 2), (10**6, 16)])
def test_as_much_of_the_vocabulary_as_fits(vocabulary: int, count: int) -> None:
    assert module.checking_sequences(vocabulary, 128) == count


@pytest.mark.parametrize(("budget", "length"), [(2**40, 2048), (1, 640)], ids=["roomy", "none"])
def test_sequences_are_as_long_as_the_budget_allows(
    folder: Path, budget: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PASS_BUDGET", budget)
    assert planned(folder).sequence_length == length
    assert planned(folder, sequence_length=1000).sequence_length == 1000  # what the recipe says is heard


def test_between_them_the_length_just_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def passing(length: int) -> int:
        monkeypatch.setattr(module, "PASS_BUDGET", 2**40)
        found = prepare(str(folder), Recipe(index_topk=512, index_n_heads=4, index_head_dim=32, sequence_length=length))
        streamed = module.streams(
            found.capture.program, found.converted, found.plan.indexer, 128, found.checkpoint.tensors
        )
        return max(piece.peak for pieces in streamed.pieces(length) for piece in pieces)

    budget = passing(1280)
    monkeypatch.setattr(module, "PASS_BUDGET", budget)
    assert planned(folder).sequence_length == 1280


def test_the_rate_is_one_of_a_machine() -> None:
    here = this_machine()
    assert 1e8 < here.rate < 1e15
    assert 2**26 < here.resident < 2**40
    assert here.seconds(replace(FITS, flops=here.rate)) == 1 / module.SHARE_OF_RATE


def test_what_fits_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: GIB)
    refuse_if_too_large(FITS, tmp_path)


def test_transformers_models_do_not_refuse_a_conversion_that_may_skip_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: GIB)
    large = replace(FITS, transformers=2**50)
    refuse_if_too_large(large, tmp_path)
    assert large.most == GIB + 2**50


def test_too_little_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: GIB - 1)
    with pytest.raises(
        UserError, match=r"needs 1\.0 GiB more memory, 1\.0 GiB are free; set a smaller sequence_length than 8192"
    ):
        refuse_if_too_large(FITS, tmp_path)


def test_too_little_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hidden states of the sequences"):
        refuse_if_too_large(replace(FITS, memory={STATES: 1}, disk=2**60), tmp_path)
