"""Text as it comes: every character once, whole, and never a part of a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from places import TINY
from transformers import AutoTokenizer

from mla2dsa.optimizer.answers.stream import Stops, detokenizer

TEXT = "héllo 世界, def main():\n\treturn 🙂"


class Foreign:
    """A tokenizer with code of its own: bytes, and no backend of tokenizers."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize("cut", [0, 3])
def test_pieces_are_the_text(tokenizer: Any, cut: int) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    decoder = detokenizer(tokenizer, ids[:cut])
    pieces = [decoder.step(token) for token in ids[cut:]]
    assert "".join(pieces) + decoder.end() == tokenizer.decode(ids[cut:])
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 5


def test_a_character_cut_off_is_told_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("a世")["input_ids"]
    decoder = detokenizer(tokenizer)
    assert "".join(decoder.step(token) for token in ids[:-1]) == "a"
    assert set(decoder.end()) == {"\ufffd"}


def test_special_tokens_are_not_shown(tokenizer: Any) -> None:
    decoder = detokenizer(tokenizer)
    ids = tokenizer("a<|endoftext|>b")["input_ids"]
    assert "".join(map(decoder.step, ids)) + decoder.end() == "ab"


def test_a_foreign_tokenizer() -> None:
    decoder = detokenizer(Foreign())
    assert "".join(map(decoder.step, TEXT.encode())) + decoder.end() == TEXT
    decoder = detokenizer(Foreign())
    assert [decoder.step(token) for token in "世".encode()[:2]] == ["", ""]
    assert decoder.end() == "\ufffd"


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "met"),
    [
        (["END"], ["a", "E", "N", "D", "b"], "a", True),
        (["END"], ["a", "E", "N", "x"], "aENx", False),
        (["END"], ["aEN"], "aEN", False),
        (["END", "a"], ["xEN", "Da"], "x", True),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", True),
        ([], ["a", "b"], "ab", False),
        (["aab"], ["aa", "ab"], "a", True),
    ],
    ids=["over-pieces", "only-begun", "held-at-the-end", "first-of-two", "newlines", "none", "overlapping"],
)
def test_stops(stops: list[str], pieces: list[str], shown: str, met: bool) -> None:
    finder = Stops(stops)
    assert "".join(map(finder.feed, pieces)) + finder.end() == shown
    assert finder.met == met


def test_what_is_certain_is_shown_at_once() -> None:
    finder = Stops(["END"])
    assert [finder.feed(piece) for piece in ["ab", "cE", "x"]] == ["ab", "c", "Ex"]
