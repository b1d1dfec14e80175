"""What is asked: a text to continue or a conversation, as token ids; and files of prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError, short
from ...files.regular import open_regular
from .opened import Opened

Message = Mapping[str, Any]


def text_ids(opened: Opened, prompt: str) -> list[int]:
    """The prompt in the model's tokens, with what its tokenizer puts before a text. Raises UserError for what is no text."""
    _check_text(prompt)
    return list(opened.tokenizer(prompt, verbose=False)["input_ids"])


def chat_ids(opened: Opened, messages: Sequence[Message]) -> list[int]:
    """The conversation in the words of the model's own chat template, up to where its answer starts. Raises UserError."""
    tokenizer = opened.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{opened.folder}: its tokenizer has no chat template, so it is no chat model; give it a text to continue instead"
        )
    for message in messages:
        _check_text(str(message.get("content")))
    try:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template raises what it likes: on roles that do not alternate, say
        reason = short((str(error).strip().splitlines() or [type(error).__name__])[0], 160)
        raise UserError(f"{opened.folder}: its chat template does not take these messages ({reason})") from error
    return list(ids)


def _check_text(text: str) -> None:
    """Raises UserError for half a character, as JSON can spell it and a shell can pass one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is no text: half a character (a surrogate) at place {error.start}") from None


def conversation(prompt: str, system: str | None = None) -> list[Message]:
    """One question, and what is said to the model before it."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: .jsonl has one a line, `{"prompt": "..."}` or a string; any other file is one prompt.

    Raises UserError for a file that is not text, or has none.
    """
    try:
        with open_regular(file) as stream:
            content = stream.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if file.suffix != ".jsonl":
        return [content]
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file}: no prompt in it")
    return [_prompt(file, number, line) for number, line in lines]


def _prompt(file: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    text = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(text, str):
        raise UserError(f'{file}: line {number} is no string, and no object with a "prompt" string')
    return text
