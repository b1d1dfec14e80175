"""Generate text from whatever can be opened: pieces of one answer, or the answers to several prompts."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import UsageError
from ..runtime.generation import Sampling
from .answers.answer import Ask, answer
from .answers.defaults import default_sampling
from .answers.opened import Opened, open_model
from .answers.prompts import chat_ids, conversation, text_ids


def generate_text(
    model: str,
    prompt: str,
    runtime: str | None,
    max_new_tokens: int,
    sampling: Sampling | None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece. sampling None: as generation_config.json says.

    Raises UserError / UsageError before the first piece.
    """
    check_count(max_new_tokens)
    opened = open_model(model, runtime, device, trust_remote_code)
    chosen = default_sampling(opened.folder) if sampling is None else sampling
    pieces = answer(opened, Ask(tuple(text_ids(opened, prompt)), max_new_tokens, chosen))
    return (piece.text for piece in pieces if piece.text)


def check_count(max_new_tokens: int) -> None:
    """Raises UsageError before anything is opened."""
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}, expected at least 1")


def ask_of(
    opened: Opened,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[str, ...] = (),
    *,
    chat: bool = False,
    system: str | None = None,
) -> Ask:
    """What to ask for a prompt. chat: it is a question in the model's chat template, with `system` said before it."""
    ids = chat_ids(opened, conversation(prompt, system)) if chat else text_ids(opened, prompt)
    return Ask(tuple(ids), max_new_tokens, sampling, stop, continues=not chat)
