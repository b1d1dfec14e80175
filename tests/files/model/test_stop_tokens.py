"""The tokens that end a text: one or several, in any of the files that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import assert_one_line
from places import TINY

from mla2dsa.errors import UserError
from mla2dsa.files.model.stop_tokens import stop_tokens

ADDED = {"added_tokens": [{"id": 5, "content": "<end>"}, {"id": 6, "content": "<other>"}]}
FOLDERS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "none": ({}, []),
    "one": ({"config.json": {"eos_token_id": 3}}, [3]),
    "list-in-generation-config": (
        {"generation_config.json": {"eos_token_id": [9, 3, 9]}, "config.json": {"eos_token_id": 1}},
        [1, 3, 9],
    ),
    "list-in-config": ({"config.json": {"eos_token_id": [4, 2]}}, [2, 4]),
    "wrapped-model": ({"config.json": {"text_config": {"eos_token_id": [8]}}}, [8]),
    "said-to-be-none": ({"config.json": {"eos_token_id": -1}, "generation_config.json": {"eos_token_id": None}}, []),
    "fast-tokenizer": ({"tokenizer_config.json": {"eos_token": "<end>"}, "tokenizer.json": ADDED}, [5]),
    "token-with-settings": (
        {"tokenizer_config.json": {"eos_token": {"content": "<end>", "lstrip": False}}, "tokenizer.json": ADDED},
        [5],
    ),
    "remote-tokenizer": (
        {"tokenizer_config.json": {"eos_token": "[E]", "added_tokens_decoder": {"163585": {"content": "[E]"}}}},
        [163585],
    ),
    "token-map": ({"special_tokens_map.json": {"eos_token": "</s>"}, "vocab.json": {"a": 0, "</s>": 2}}, [2]),
    "plain-vocabulary": (
        {"tokenizer_config.json": {"eos_token": "z"}, "tokenizer.json": {"model": {"vocab": {"z": 7}}}},
        [7],
    ),
    "all-three": (
        {
            "config.json": {"eos_token_id": 1},
            "generation_config.json": {"eos_token_id": [2, 3]},
            "tokenizer_config.json": {"eos_token": "<end>"},
            "tokenizer.json": ADDED,
        },
        [1, 2, 3, 5],
    ),
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("case", FOLDERS)
def test_the_union_of_all_files(case: str, tmp_path: Path) -> None:
    files, ids = FOLDERS[case]
    assert stop_tokens(write(tmp_path, files)) == ids


@pytest.mark.parametrize("value", ["0", [0, "1"], True, 1.5, [[1]], {"a": 1}], ids=str)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_id(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        stop_tokens(write(tmp_path, {name: {"eos_token_id": value}}))
    assert_one_line(error, tmp_path / name, "eos_token_id is", "expected a token's id")


def test_the_example_agrees_with_transformers() -> None:
    from transformers import AutoTokenizer, GenerationConfig

    ids = {GenerationConfig.from_pretrained(TINY).eos_token_id, AutoTokenizer.from_pretrained(TINY).eos_token_id}
    assert stop_tokens(TINY) == sorted(ids)
