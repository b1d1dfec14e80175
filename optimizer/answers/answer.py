"""An answer, token by token: its text, its likelihood, and why it ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import UsageError
from ...runtime.generation import Sampling, steps
from .opened import Opened
from .stream import Stops, detokenizer


@dataclass(frozen=True)
class Ask:
    """ids: the prompt. stop: texts that end the answer. logprobs: None, or how many alternatives to tell of each token.

    continues: the answer goes on with the prompt's text (a completion), so that a space between them is kept.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    continues: bool = True


@dataclass(frozen=True)
class Likely:
    """A token and the natural logarithm of its probability, before any temperature."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Piece:
    """token: None in the last piece of all, whose `finish` says why it ended: "stop" or "length". text: often empty, for a token
    may be part of a character or of a stop string. top: the most likely tokens in its place, most likely first."""

    text: str
    token: int | None = None
    finish: str | None = None
    chosen: Likely | None = None
    top: tuple[Likely, ...] = ()


def answer(opened: Opened, ask: Ask) -> Iterator[Piece]:
    """Raises UsageError, or UserError when the prompt and what is asked for do not fit into the cache."""
    if ask.max_new_tokens < 1:
        raise UsageError(f"{ask.max_new_tokens} new tokens, expected at least 1")
    decoder = detokenizer(opened.tokenizer, ask.ids if ask.continues else ())
    stops, finish = Stops(ask.stop), "length"
    for step in steps(opened.session, [ask.ids], ask.max_new_tokens, ask.sampling, opened.stop):
        token = step.picked[0]
        if token is None:
            finish = "stop"
            break
        text = stops.feed(decoder.step(token))
        yield _piece(opened, ask, text, token, step.logits[0])
        if stops.met:
            break
    rest = "" if stops.met else stops.feed(decoder.end()) + stops.end()
    yield Piece(rest, finish="stop" if stops.met else finish)


def _piece(opened: Opened, ask: Ask, text: str, token: int, logits: Tensor) -> Piece:
    if ask.logprobs is None:
        return Piece(text, token)
    scores = torch.log_softmax(logits.float(), -1)
    best = scores.topk(min(ask.logprobs, len(scores))).indices.tolist()
    told = {it: Likely(it, opened.tokenizer.decode([it]), float(scores[it])) for it in {token, *best}}
    return Piece(text, token, None, told[token], tuple(told[it] for it in best))


def room(opened: Opened, prompt: int) -> int:
    """Most tokens that can follow a prompt of that length."""
    return max(opened.session.capacity - prompt + 1, 0)
