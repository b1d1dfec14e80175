"""OpenAI's words for an answer: whole, or chunk by chunk."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..optimizer.answers.answer import Likely, Piece


@dataclass
class Reply:
    """One answer as it grows. chat: its form; prompt_tokens: of the request."""

    model: str
    chat: bool
    prompt_tokens: int
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def first(self) -> list[dict[str, Any]]:
        """What comes before any text: a chat says who speaks."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.chat else []

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """None for a piece that has nothing to tell yet."""
        self.tokens += piece.token is not None
        logprobs = self._logprobs([piece])
        self.length += len(piece.text)
        if not (piece.text or piece.finish or logprobs):
            return None
        delta = {"content": piece.text} if piece.text or logprobs else {}
        text = {"delta": delta} if self.chat else {"text": piece.text}
        return self._chunk({**text, "logprobs": logprobs}, piece.finish)

    def last(self) -> dict[str, Any]:
        """The chunk that counts."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer in one."""
        self.tokens = sum(piece.token is not None for piece in pieces)
        text = "".join(piece.text for piece in pieces)
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        )
        choice = {"index": 0, **said, "logprobs": self._logprobs(pieces), "finish_reason": pieces[-1].finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind if self.chat else "text_completion", "created": self.created, "model": self.model,
        }  # fmt: skip

    def _chunk(self, said: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, **said, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        told = [piece for piece in pieces if piece.chosen is not None]
        if not told:
            return None
        return {"content": [_entry(piece) for piece in told], "refusal": None} if self.chat else self._columns(pieces)

    def _columns(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        at = self.length
        for piece in pieces:
            if piece.chosen is not None:
                columns["tokens"].append(piece.chosen.text)
                columns["token_logprobs"].append(piece.chosen.logprob)
                columns["top_logprobs"].append({it.text: it.logprob for it in piece.top})
                columns["text_offset"].append(at)
            at += len(piece.text)
        return columns


def _entry(piece: Piece) -> dict[str, Any]:
    assert piece.chosen is not None
    return {**_likely(piece.chosen), "top_logprobs": [_likely(it) for it in piece.top]}


def _likely(it: Likely) -> dict[str, Any]:
    """A part of a character has no text, and its bytes are not known here."""
    known = None if "\ufffd" in it.text else list(it.text.encode())
    return {"token": it.text, "logprob": it.logprob, "bytes": known}


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    return {"object": "list", "data": [model_object(name, created) for name in names]}


def model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "mla2dsa"}
