"""Questions about long texts: what they look like, and what models that answer rightly, wrongly or not at all are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from places import TINY
from torch import Tensor

from mla2dsa.errors import UsageError, UserError
from mla2dsa.optimizer.model.text import load_tokenizer
from mla2dsa.optimizer.proof.long_tasks import Score, TaskScore, answered, check
from mla2dsa.optimizer.proof.questions import KINDS, Asker, Question, questions

LENGTH = 512
ROOMY = {"common-words": 2048}  # a list of words is longer than half of the others
VOCABULARY = 1024


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY)


def asker(tokenizer: Any, kind: str = "needle", seed: int = 0) -> Asker:
    return Asker(tokenizer, ROOMY.get(kind, LENGTH), seed)


def text_of(tokenizer: Any, question: Question) -> tuple[str, str]:
    """(text and question, answer)."""
    cut = len(question.ids) - question.answer
    return tokenizer.decode(question.ids[:cut]), tokenizer.decode(question.ids[cut:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_question_has_its_length_and_its_answer(kind: str, depth: float, tokenizer: Any) -> None:
    question = asker(tokenizer, kind).ask(kind, depth)
    assert (question.ids.dtype, len(question.ids)) == (torch.int64, ROOMY.get(kind, LENGTH))
    text, answer = text_of(tokenizer, question)
    assert answer.startswith(" ")
    for part in answer.split(","):
        assert part.strip() in text
    asked = text[text.rindex("\n") :]
    if kind in ("needle", "multi-key"):
        assert text.count(asked + answer) == 1  # told once, word for word as it is asked


@pytest.mark.parametrize("kind", ["needle", "multi-key"])
def test_the_answer_is_where_the_depth_says(kind: str, tokenizer: Any) -> None:
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        text, answer = text_of(tokenizer, asker(tokenizer, seed=3).ask(kind, depth))
        told = text.index(f"{answer}.") / len(text)
        assert abs(told - depth) < 0.15


def test_a_chain_is_told_in_its_order(tokenizer: Any) -> None:
    text, answer = text_of(tokenizer, asker(tokenizer).ask("variables", 0.5))
    name = text[text.rindex("assert ") + 7 :].split()[0]
    for _ in range(4):
        line = text[text.index(f"\n{name} =") :].split("\n")[1]
        assert text.index(f"\n{line.split()[2]} =") < text.index(f"\n{name} =")
        name = line.split()[2]
    assert f"\n{name} ={answer}\n" in text


def test_the_seed_decides(tokenizer: Any) -> None:
    first, again, other = (
        [q.ids.tolist() for q in questions(asker(tokenizer, seed=seed), "needle", (0.0, 1.0), 4)] for seed in (0, 0, 1)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_text_is_what_things_are_hidden_in(tokenizer: Any) -> None:
    hay = torch.tensor(tokenizer("def f(x):\n    return x\n" * 200)["input_ids"])
    text, _ = text_of(tokenizer, Asker(tokenizer, LENGTH, 0, hay).ask("needle", 0.5))
    assert text.count("return x") > 20
    with pytest.raises(UserError, match="100 tokens of text, expected at least 512"):
        Asker(tokenizer, LENGTH, 0, hay[:100])


def test_what_does_not_fit_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="common-words needs more than 64 tokens"):
        Asker(tokenizer, 64, 0).ask("common-words", 0.5)


class Stub:
    """A model that always says what comes next, or is wrong about `wrong` tokens from the end, by the margin `sure`."""

    def __init__(self, wrong: tuple[int, ...] = (), sure: float = 20.0) -> None:
        self.wrong, self.sure = wrong, sure

    def outputs_of(self, batches: list[dict[str, Tensor]]) -> Any:
        for batch in batches:
            ids = batch["input_ids"]
            said = torch.cat([ids[:, 1:], ids[:, :1]], -1)
            for back in self.wrong:
                said[:, -1 - back] = (said[:, -1 - back] + 1) % VOCABULARY
            yield [torch.nn.functional.one_hot(said, VOCABULARY) * self.sure]


def scores(tokenizer: Any, **others: Stub) -> TaskScore:
    asked = questions(asker(tokenizer), "needle", (0.0, 0.5), 4)
    return answered(Stub(), others, asked)  # type: ignore[arg-type]


def test_who_says_the_answer_is_right(tokenizer: Any) -> None:
    """Position -1 says what comes after the answer, so that of the answer's last token is -2."""
    found = scores(tokenizer, dsa=Stub(wrong=(0,)), window=Stub(wrong=(1,)), oracle=Stub(wrong=(300,)))
    accuracy = {name: score.accuracy for name, score in found.by_model.items()}
    assert accuracy == {"dense": 1.0, "dsa": 1.0, "window": 0.0, "oracle": 1.0}
    assert found.by_model["dense"].log_probability == pytest.approx(0.0, abs=1e-4)
    assert found.by_model["window"].log_probability == pytest.approx(-20.0, abs=1e-3)
    assert found.by_depth["window"] == {0.0: 0.0, 0.5: 0.0}
    assert (found.questions, found.length, found.kind) == (4, LENGTH, "needle")


@pytest.mark.parametrize(("dsa", "passed"), [(1.0, True), (0.98, True), (0.97, False), (0.0, False)])
def test_points_that_are_lost_are_held_against_the_limit(dsa: float, passed: bool) -> None:
    task = TaskScore("needle", 4096, 100, {"dense": Score(1.0, 0.0), "dsa": Score(dsa, -1.0)}, {})
    found = check(task, 2.0)
    assert found.passed == passed
    assert "needle at 4096 tokens" in found.name
