"""Tokens become text as they come, and a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

_BEFORE = 8  # tokens of the prompt that a decoder sees: whether a space comes first depends on what came before


class Detokenizer(Protocol):
    """Text by tokens; a character may take several."""

    def step(self, token: int) -> str:
        """What has become certain with this token."""
        ...

    def end(self) -> str:
        """What is left: of a character that was never finished."""
        ...


def detokenizer(tokenizer: Any, prompt: Sequence[int] = ()) -> Detokenizer:
    """tokenizers' own stream decoder where the tokenizer is one of theirs. prompt: what the text continues."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _Whole(tokenizer) if backend is None else _Streamed(backend, prompt)


class _Streamed:
    def __init__(self, backend: Any, prompt: Sequence[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._stream = DecodeStream(ids=list(prompt[-_BEFORE:]), skip_special_tokens=True)
        self._waiting: list[int] = []

    def step(self, token: int) -> str:
        text = self._stream.step(self._backend, token)
        self._waiting = [*self._waiting, token] if text is None else []
        return text or ""

    def end(self) -> str:
        return str(self._backend.decode(self._waiting, skip_special_tokens=True)) if self._waiting else ""


class _Whole:
    """Of a tokenizer with code of its own: all tokens are decoded again with each."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def step(self, token: int) -> str:
        self._ids.append(token)
        text = self._decoded()
        return "" if text.endswith("\ufffd") else self._new(text)

    def end(self) -> str:
        return self._new(self._decoded())

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _new(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new


class Stops:
    """Holds back what may be the beginning of a stop string. `met`: one has come; neither it nor what follows is given out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.met = False

    def feed(self, text: str) -> str:
        """What of the text so far is sure to be shown."""
        if self.met:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.met = True
            return self._held[: min(found)]
        kept = self._tail()
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown

    def end(self) -> str:
        """What was held back, once no more text comes."""
        shown, self._held = ("" if self.met else self._held), ""
        return shown

    def _tail(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        lengths = range(min(max(map(len, self._stops), default=1) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)
