"""The tokens that end a text: what generation_config.json, config.json and the tokenizer's files say, together.

Any of the three may name one or several, and they often differ: a chat model's generation_config.json has the end of a turn,
its tokenizer the end of a document. Nothing of the tokenizer is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from .model_files import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, optional_json

FIELD = "eos_token_id"


def stop_tokens(folder: Path) -> list[int]:
    """Their ids in order. Raises UserError for an eos_token_id that is no id."""
    found: set[int] = set()
    for name in (GENERATION_CONFIG, CONFIG):
        fields = optional_json(folder / name)
        nested = fields.get("text_config")  # of a model that reads more than text
        for part in (fields, nested if isinstance(nested, dict) else {}):
            found |= set(_ids(part.get(FIELD), folder / name))
    return sorted(found | set(_of_tokenizer(folder)))


def _ids(value: Any, file: Path) -> Iterator[int]:
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(one, int) or isinstance(one, bool):
            raise UserError(f"{file}: {FIELD} is {value!r}, expected a token's id or a list of them")
        if one >= 0:  # -1 is how some say that there is none
            yield one


def _of_tokenizer(folder: Path) -> Iterator[int]:
    settings = optional_json(folder / TOKENIZER_CONFIG)
    token = settings.get("eos_token") or optional_json(folder / "special_tokens_map.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str):
        yield from {int(it) for name, it in _vocabulary(folder, settings) if name == text}


def _vocabulary(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(text, id) of every token that the files name; of a tokenizer with code of its own those of tokenizer_config.json."""
    fast = optional_json(folder / "tokenizer.json")
    model = fast.get("model")
    for entries in (fast.get("added_tokens"), _numbered(settings.get("added_tokens_decoder"))):
        yield from (
            (it.get("content"), it["id"]) for it in entries or () if isinstance(it, dict) and _is_id(it.get("id"))
        )
    plain = (optional_json(folder / name) for name in ("added_tokens.json", "vocab.json"))
    for vocabulary in (model.get("vocab") if isinstance(model, dict) else None, *plain):
        if isinstance(vocabulary, dict):
            yield from ((text, number) for text, number in vocabulary.items() if _is_id(number))


def _numbered(decoder: Any) -> list[dict[str, Any]]:
    entries = decoder.items() if isinstance(decoder, dict) else ()
    return [{**token, "id": int(number)} for number, token in entries if isinstance(token, dict) and number.isdigit()]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
