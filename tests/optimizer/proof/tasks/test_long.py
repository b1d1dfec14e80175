"""Scores of sessions that answer rightly, wrongly or half, and what the gates make of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from answering import SURE, VOCABULARY, Teller, goes_on
from places import TINY

from mla2dsa.commands.parser import read_numbers
from mla2dsa.errors import UsageError
from mla2dsa.optimizer.model.text import load_tokenizer
from mla2dsa.optimizer.proof.tasks.answers import ask, share_found
from mla2dsa.optimizer.proof.tasks.examples import Example, examples
from mla2dsa.optimizer.proof.tasks.long import (
    LongResult,
    Settings,
    check_lengths,
    gate_names,
    long_checks,
    score_all,
)
from mla2dsa.optimizer.proof.tasks.prompts import STYLES
from mla2dsa.optimizer.proof.tasks.selections import VARIANTS
from mla2dsa.optimizer.proof.tasks.words import built_in

LENGTHS, END = (300, 400), 0
SETTINGS = Settings(LENGTHS, (0, 100), ("single", "multi-value", "variables"), samples=2, batch=2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> list[Example]:
    of = SETTINGS
    return list(
        examples(tokenizer, of.tasks, of.lengths, of.depths, of.samples, of.seed, STYLES[of.style], built_in(of.seed))
    )


def told(
    asked: list[Example], change: Callable[[tuple[int, ...]], tuple[int, ...]]
) -> Callable[[tuple[int, ...]], int]:
    return goes_on({example.prompt: change(example.answer) for example in asked}, END)


def right(answer: tuple[int, ...]) -> tuple[int, ...]:
    return answer


def wrong(answer: tuple[int, ...]) -> tuple[int, ...]:
    return ()


def half(answer: tuple[int, ...]) -> tuple[int, ...]:
    return answer[: len(answer) // 2]


@pytest.fixture(scope="module")
def result(tokenizer: Any, asked: list[Example]) -> LongResult:
    """dense is right, the oracle too, DSA is right up to half of an answer, and the window knows nothing."""
    tells = {
        "dense": told(asked, right),
        "oracle": told(asked, right),
        "dsa": told(asked, half),
        "window": told(asked, wrong),
    }
    seen: list[tuple[int, int]] = []

    def session(variant: str, batch: int, capacity: int) -> Teller:
        return Teller(tells[variant], batch, capacity)

    found = score_all(session, tokenizer, SETTINGS, 64, [END], lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(asked) * len(VARIANTS),) * 2
    return found


def test_right_and_wrong_answers(result: LongResult) -> None:
    for length in LENGTHS:
        for task in SETTINGS.tasks:
            found = {variant: result.of(task, length, variant) for variant in VARIANTS}
            assert {score.accuracy for score in found["dense"] + found["oracle"]} == {100.0}
            assert {score.exact for score in found["dense"]} == {100.0}
            assert {score.accuracy for score in found["window"]} == {0.0}
            assert {score.exact for score in found["dsa"] + found["window"]} == {0.0}
            assert result.logprob(task, length, "dense") == pytest.approx(0, abs=1e-4)
            assert result.logprob(task, length, "window") < result.logprob(task, length, "dsa") < -1
        assert 0 < result.accuracy("multi-value", length, "dsa") < 100
    assert len(result.scores) == len(LENGTHS) * len(VARIANTS) * (2 + 2 + 1)
    assert result.haystack == "built-in sentences"


def test_the_log_probability_is_that_of_the_right_answer(asked: list[Example], tokenizer: Any) -> None:
    """A session that answers something else from the second token on is then told the right tokens."""
    example = asked[0]
    wrong_after_one = goes_on({example.prompt: (example.answer[0], 5, 6, 7)}, END)
    session = Teller(wrong_after_one, 1, example.length)
    (answer,) = ask(session, [example], tokenizer.decode, [END])
    sure = -math.log(1 + (VOCABULARY - 1) * math.exp(-SURE))
    unsure = sure - SURE
    assert answer.logprob == pytest.approx(sure + (len(example.answer) - 1) * unsure, rel=1e-4)
    assert (answer.found, answer.exact) == (0.0, False)
    assert answer.text == tokenizer.decode([example.answer[0], 5, 6, 7])


def test_one_prefill_a_prompt(asked: list[Example], tokenizer: Any) -> None:
    session = Teller(told(asked, right), 2, asked[0].length)
    ask(session, asked[:2], tokenizer.decode, [END])
    longest = max(len(example.prompt) for example in asked[:2])
    assert session.prefilled == math.ceil(longest / 512)
    assert session.steps <= max(len(example.answer) for example in asked[:2]) + 1


def test_rows_of_a_batch_answer_as_they_do_alone(asked: list[Example], tokenizer: Any) -> None:
    tell = goes_on({asked[0].prompt: asked[0].answer, asked[5].prompt: asked[5].answer[:3]}, END)
    pair = [asked[0], asked[5]]
    together = ask(Teller(tell, 2, 300), pair, tokenizer.decode, [END])
    alone = [ask(Teller(tell, 1, 300), [example], tokenizer.decode, [END])[0] for example in pair]
    assert [(a.text, a.found, a.exact) for a in together] == [(a.text, a.found, a.exact) for a in alone]
    assert [a.logprob for a in together] == pytest.approx([a.logprob for a in alone])


@pytest.mark.parametrize(
    ("text", "wanted", "share"),
    [(" 12, 345.", ["12", "345"], 1), (" 1234", ["123"], 0), ("ab Cd", ["cd", "x"], 0.5), ("", ["a"], 0)],
)
def test_what_an_answer_names(text: str, wanted: list[str], share: float) -> None:
    assert share_found(text, wanted) == share


@pytest.mark.parametrize(
    ("gates", "passed"),
    [
        ({"needle": 2}, False),
        ({"single": 99.0}, False),
        ({"needle": 99.5}, True),
        ({"single-logprob": 100.0}, True),
        ({"long-logprob": 0.1}, False),
        ({"tracking": 100.0}, False),  # dense cannot lose more: the limit shows nothing
    ],
    ids=str,
)
def test_gates(gates: Mapping[str, float], passed: bool, result: LongResult) -> None:
    checks = long_checks(result, gates)
    assert len(checks) == len(LENGTHS)
    assert {check.passed for check in checks} == {passed}
    assert all(next(iter(gates)) in check.name for check in checks)


def test_a_dense_model_that_fails_passes_no_gate(asked: list[Example], tokenizer: Any) -> None:
    settings = Settings((300,), (0,), ("single",), samples=1)
    tell = told(asked, wrong)
    found = score_all(lambda variant, batch, capacity: Teller(tell, batch, capacity), tokenizer, settings, 64, [END])
    (check,) = long_checks(found, {"needle": 2})
    assert not check.passed
    assert "dense itself answers 0%" in check.detail
    assert math.isnan(found.scores[0].standard_error)


def test_names_of_gates() -> None:
    assert gate_names(SETTINGS)[:4] == ["long", "needle", "tracking", "single"]
    assert "single-logprob" in gate_names(SETTINGS)
    assert "words" not in gate_names(SETTINGS)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"tasks": ("x",)}, "--tasks x: expected one of single"),
        ({"style": "x"}, "--style x"),
        ({"lengths": ()}, "--lengths"),
        ({"lengths": (512, 512)}, "--lengths"),
        ({"depths": (101,)}, "--depths"),
        ({"samples": 0}, "--samples 0"),
        ({"batch": 0}, "--batch 0"),
    ],
    ids=str,
)
def test_bad_settings(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        Settings(**{"lengths": (512,), **fields})


@pytest.mark.parametrize("length", [64, 1025])
def test_lengths_that_say_nothing(length: int) -> None:
    with pytest.raises(UsageError, match=f"--lengths {length}.*index_topk 64.*1024"):
        check_lengths([length], 64, 1024)


def test_numbers() -> None:
    assert read_numbers("--lengths", "4k, 8192,1K") == (4096, 8192, 1024)
    for text in ("", "4m", "k", "1,,2"):
        with pytest.raises(UsageError, match="--lengths"):
            read_numbers("--lengths", text)
