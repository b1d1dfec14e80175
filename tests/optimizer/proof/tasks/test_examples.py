"""Prompts: as long as asked for, the same for a seed, and with what is asked for in them, where it was asked for."""

import re
from pathlib import Path
from typing import Any

import pytest
from places import TINY

from mla2dsa.errors import UsageError, UserError
from mla2dsa.optimizer.model.text import load_tokenizer
from mla2dsa.optimizer.proof.tasks.examples import EXTRA, Example, examples, split
from mla2dsa.optimizer.proof.tasks.prompts import COMMON, STYLES, TASKS
from mla2dsa.optimizer.proof.tasks.words import Haystack, built_in, from_text

LENGTH = 700


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY)


def made(tokenizer: Any, task: str, style: str = "prose", depth: int = 50, seed: int = 0) -> Example:
    (found,) = examples(tokenizer, [task], [LENGTH], [depth], 1, seed, STYLES[style], built_in())
    return found


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_fills_its_length_and_holds_its_answer(task: str, style: str, tokenizer: Any) -> None:
    found = made(tokenizer, task, style)
    used = len(found.prompt) + len(found.answer) + EXTRA
    assert 0.93 * LENGTH < used <= LENGTH
    text, answer = tokenizer.decode(found.prompt), tokenizer.decode(found.answer)
    assert all(word in text and word in answer for word in found.wanted)
    assert found == made(tokenizer, task, style)
    assert found.prompt != made(tokenizer, task, style, seed=1).prompt
    assert (found.depth is None) is not TASKS[task].deep


@pytest.mark.parametrize("task", ["single", "multi-key", "multi-value"])
def test_the_needle_lies_at_its_depth(task: str, tokenizer: Any) -> None:
    for depth in (0, 50, 100):
        found = made(tokenizer, task, depth=depth)
        text = tokenizer.decode(found.prompt)
        places = [text.index(f"is: {value}.") / len(text) for value in found.wanted]
        assert any(abs(place - depth / 100) < 0.16 for place in places)


def test_other_keys_lie_beside(tokenizer: Any) -> None:
    text = tokenizer.decode(made(tokenizer, "multi-key").prompt)
    needles = dict(re.findall(r"magic numbers for ([\w-]+) is: (\d+)\.", text))
    assert len(needles) == 4
    asked = re.findall(r"magic number for ([\w-]+)", text)[-1]
    assert made(tokenizer, "multi-key").wanted == (needles[asked],)


def test_a_chain_is_in_order(tokenizer: Any) -> None:
    found = made(tokenizer, "variables")
    lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", tokenizer.decode(found.prompt))
    assert [name for name, _ in lines] == list(found.wanted)
    assert [of for _, of in lines][1:] == list(found.wanted)[:-1]


def test_common_words_are_the_most_common(tokenizer: Any) -> None:
    found = made(tokenizer, "common-words")
    words = re.findall(r"\d+\. (\w+)", tokenizer.decode(found.prompt))
    counts = {word: words.count(word) for word in words}
    ranked = sorted(counts, key=lambda word: -counts[word])
    assert set(ranked[:COMMON]) == set(found.wanted)
    assert counts[ranked[COMMON - 1]] > counts[ranked[COMMON]]


def test_a_length_that_is_too_short(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"--lengths 40: the task single takes \d+ tokens"):
        list(examples(tokenizer, ["single"], [40], [0], 1, 0, STYLES["prose"], built_in()))


def test_text_of_the_users(tokenizer: Any, tmp_path: Path) -> None:
    """Cut into lines, long ones between sentences; it comes round again where it is short."""
    (tmp_path / "text.txt").write_text("first line\n\n" + "A sentence of it. " * 40 + "\n")
    haystack = from_text(tmp_path / "text.txt")
    assert haystack.lines[0] == "first line\n"
    assert haystack.lines[1] == "A sentence of it.\n"
    (found,) = examples(tokenizer, ["single"], [LENGTH], [0], 1, 0, STYLES["code"], haystack)
    assert "A sentence of it.\n" in tokenizer.decode(found.prompt)
    with pytest.raises(UserError, match="no such file or folder of text"):
        from_text(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="no text in it"):
        from_text(tmp_path / "empty.txt")


def test_lines_come_round_again() -> None:
    assert Haystack(("a", "b", "c"), "").take(2, 5) == ["c", "a", "b", "c", "a"]


def test_tokens_are_those_of_the_whole(tokenizer: Any) -> None:
    prompt, answer = split(tokenizer, "The number is", " 123")
    assert prompt + answer == tokenizer("The number is 123")["input_ids"]
    prompt, answer = split(tokenizer, "def ma", "in")  # one token spans both
    assert tokenizer.decode(prompt) == "def ma"
    assert tokenizer.decode(answer) == "in"
