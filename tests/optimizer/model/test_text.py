"""Text: files, folders and .jsonl become token sequences; what is not text is refused in one line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import TINY

from mla2dsa.errors import UserError
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.model.text import (
    RANDOM,
    Tokens,
    documents,
    load_tokenizer,
    model_tokens,
    random_tokens,
    read_tokens,
)


class Letters:
    """A tokenizer for tests: one token a character, `end` between documents."""

    def __init__(self, end: int | None = 0, begin: int | None = None) -> None:
        self.eos_token_id, self.bos_token_id = end, begin

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(letter) for letter in text]}


def letters(tokens: Tokens) -> str:
    return "".join("|" if token == 0 else chr(token) for token in tokens.ids.tolist())


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


# Reading


def test_a_file_is_one_document(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "one\n\ntwo"})
    assert letters(read_tokens(tmp_path / "a.txt", Letters())) == "|one\n\ntwo"


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"b.txt": "bb", "a.md": "aa", "sub/c.py": "cc"})
    assert letters(read_tokens(tmp_path, Letters())) == "|aa|bb|cc"


def test_what_a_folder_says_about_itself_is_not_text(tmp_path: Path) -> None:
    about = {"README.md": "r", "sub/README": "r", "LICENSE": "l", "LICENSE-PSF": "l", ".hidden": "h", ".git/index": "h"}
    write(tmp_path, {"a.txt": "aa", "empty": " \n", **about})
    assert list(documents(tmp_path)) == ["aa"]


def test_a_readme_given_by_name_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"README.md": "text"})
    assert list(documents(tmp_path / "README.md")) == ["text"]


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "one\ntwo", "id": 3}), "", json.dumps({"text": "  "}), json.dumps({"text": "ü"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert list(documents(tmp_path / "a.jsonl")) == ["one\ntwo", "ü"]
    assert list(documents(tmp_path)) == ["one\ntwo", "ü"]


def test_jsonl_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    """They are no line ends in JSON, though str.splitlines takes them for some."""
    text = "a\u2028b\u0085c"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(documents(tmp_path / "a.jsonl")) == [text]


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(Letters(end=0, begin=1), "|aa|bb"), (Letters(end=None, begin=0), "|aa|bb"), (Letters(end=None), "aabb")],
    ids=["end", "begin", "neither"],
)
def test_documents_are_joined_by_the_end_of_text_token(tmp_path: Path, tokenizer: Letters, expected: str) -> None:
    write(tmp_path, {"a.txt": "aa", "b.txt": "bb"})
    assert letters(read_tokens(tmp_path, tokenizer)) == expected


def test_limit_stops_reading(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "aaaa", "b.txt": "bbbb"})
    (tmp_path / "c.txt").write_bytes(b"\xff")  # never reached
    tokens = read_tokens(tmp_path, Letters(), limit=7)
    assert letters(tokens) == "|aaaa|b"
    assert tokens.origin == str(tmp_path)


def test_with_the_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    text = "def f(x):\n    return x + 1\n"
    write(tmp_path, {"a.py": text, "b.py": text})
    ids = read_tokens(tmp_path, tokenizer).ids
    assert ids.dtype == torch.int64
    assert (ids == tokenizer.eos_token_id).nonzero().flatten().tolist() == [0, len(ids) // 2]
    assert tokenizer.decode(ids[1 : len(ids) // 2]) == text


# What is not text


def one_line(error: pytest.ExceptionInfo[UserError], *parts: object) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert str(part) in str(error.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_tokens(tmp_path / "none", Letters())
    one_line(error, tmp_path / "none", "no such file or folder of text")


@pytest.mark.parametrize("files", [{}, {"a.txt": " \n"}, {"README.md": "text"}, {"a.jsonl": "\n"}], ids=str)
def test_no_text(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(UserError) as error:
        read_tokens(write(tmp_path, files), Letters())
    one_line(error, tmp_path, "no text in it")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"abc\xff\xfe")
    with pytest.raises(UserError) as error:
        list(documents(tmp_path))
    one_line(error, tmp_path / "model.bin", "not UTF-8 text (byte 3)")


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"content": "a"}', '{"text": 3}', '{"text": null}'])
def test_jsonl_without_text(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(UserError) as error:
        list(documents(tmp_path / "a.jsonl"))
    one_line(error, tmp_path / "a.jsonl", "line 3")


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    one_line(error, tmp_path, "no tokenizer that transformers can load")


# In the tokens of a model


def test_model_tokens_are_the_texts_or_random_ones(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(TINY)
    write(tmp_path, {"a.py": "import os\n"})
    text = model_tokens(checkpoint, tmp_path, 5)
    assert torch.equal(text.ids, read_tokens(tmp_path, load_tokenizer(TINY)).ids)
    none = model_tokens(checkpoint, None, 3000, seed=4)
    assert torch.equal(none.ids, random_tokens(3000, 1024, seed=4).ids)
    assert none.origin == RANDOM


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    model = write(tmp_path / "model", {"a.txt": "def f(x): return x"})
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (model / name).symlink_to(TINY / name)
    config = json.loads((TINY / "config.json").read_text()) | {"vocab_size": 40}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        model_tokens(Checkpoint.open(model), model / "a.txt", 5)
    one_line(error, model, "the tokenizer gives token", "vocab_size 40")


# Sequences


@given(st.integers(1, 400), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 40)))
def test_sequences_do_not_overlap_and_span_the_text(total: int, length: int, count: int | None) -> None:
    tokens = Tokens(torch.arange(total), "text")
    if total < length:
        with pytest.raises(UserError, match=f"^text: {total} tokens, expected at least {length}"):
            tokens.sequences(length, count)
        return
    found = tokens.sequences(length, count)
    starts = [int(ids[0]) for ids in found]
    assert len(found) == min(total // length, count or total)
    assert all(torch.equal(ids, torch.arange(start, start + length)) for ids, start in zip(found, starts, strict=True))
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(gap >= length for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= length  # evenly spread
    assert starts[0] == 0


@given(st.integers(2, 300), st.floats(0, 1))
def test_split_keeps_every_token_once(total: int, share: float) -> None:
    tokens = Tokens(torch.arange(total), "text")
    first, last = tokens.split(share)
    assert torch.equal(torch.cat([first.ids, last.ids]), tokens.ids)
    assert abs(len(last.ids) - share * total) <= 0.5 + 1e-9
    assert (first.origin, last.origin) == ("text", "text")


def test_random_tokens_are_seeded_and_use_the_whole_vocabulary() -> None:
    first = random_tokens(4000, 7, seed=1)
    assert torch.equal(first.ids, random_tokens(4000, 7, seed=1).ids)
    assert not torch.equal(first.ids, random_tokens(4000, 7, seed=2).ids)
    assert sorted(set(first.ids.tolist())) == list(range(7))
    assert first.origin == RANDOM
