"""From a request to pieces: what to ask a model for, and its answer across the threads."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from ..errors import UserError, short
from ..optimizer.answers.answer import Ask, Piece, room
from ..runtime.generation import Sampling
from .requests import ApiError, Asked, ChatAsked, CompletionAsked
from .worker import Busy, Closed, Worker

DEFAULT_TOKENS = 16  # of a completion that does not say how many: OpenAI's


def ask_for(worker: Worker, asked: CompletionAsked | ChatAsked, most: int) -> Ask:
    """Takes time (the prompt is tokenised): not for the event loop. Raises ApiError for what the model cannot do."""
    chat = isinstance(asked, ChatAsked)
    ids = _chat(worker, asked) if isinstance(asked, ChatAsked) else _completion(worker, asked)
    left = room(worker.opened, len(ids))
    wanted = _wanted(asked, most)
    if left < (wanted or 1):
        raise ApiError(
            400,
            f"the prompt has {len(ids)} tokens and {wanted or 1} are asked for, the context holds {worker.opened.session.capacity}",
            "context_length_exceeded",
            "messages" if chat else "prompt",
        )
    count = wanted or min(most if chat else DEFAULT_TOKENS, most, left)
    sampling = _sampling(worker.sampling, asked)
    return Ask(tuple(ids), count, sampling, asked.stops, asked.alternatives, continues=not chat)


def _completion(worker: Worker, asked: CompletionAsked) -> list[int]:
    text = asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0]
    if isinstance(text, str):
        try:
            ids = worker.text_ids(text)
        except UserError as error:
            raise ApiError(400, str(error), "invalid_value", "prompt") from None
    else:
        ids = [int(it) for it in asked.prompt]
        size = len(worker.opened.tokenizer)
        if not all(0 <= it < size for it in ids):
            raise ApiError(400, f"prompt: a token's id is from 0 to {size - 1}", "invalid_value", "prompt")
    if not ids:
        raise ApiError(400, "prompt: no tokens in it", "invalid_value", "prompt")
    return ids


def _chat(worker: Worker, asked: ChatAsked) -> list[int]:
    try:
        return worker.chat_ids([message.plain() for message in asked.messages])
    except UserError as error:
        known = str(error).removeprefix(f"{worker.opened.folder}: ")  # where it lies is nothing for a client
        raise ApiError(400, f"{worker.opened.name}: {known}", "invalid_value", "messages") from None


def _wanted(asked: Asked, most: int) -> int | None:
    named = {"max_completion_tokens": getattr(asked, "max_completion_tokens", None), "max_tokens": asked.max_tokens}
    given = {name: count for name, count in named.items() if count is not None}
    if not given:
        return None
    name, count = next(iter(given.items()))
    if count > most:
        raise ApiError(400, f"{name} is {short(count)}, this server gives at most {most}", "invalid_value", name)
    return count


def _sampling(default: Sampling, asked: Asked) -> Sampling:
    given: dict[str, Any] = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k}
    seed = secrets.randbits(31) if asked.seed is None else asked.seed
    return replace(default, seed=seed, **{name: it for name, it in given.items() if it is not None})


@asynccontextmanager
async def pieces_of(worker: Worker, ask: Ask) -> AsyncIterator[AsyncIterator[Piece]]:
    """The pieces as the worker makes them; left early, the worker stops. Raises ApiError when it takes no more requests."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def emit(piece: Piece | Exception) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(arrived.put_nowait, piece)

    try:
        job = worker.submit(ask, emit)
    except Busy:
        raise ApiError(429, "as many requests wait as may; try again", "queue_full", retry_after=1) from None
    except Closed:
        raise ApiError(503, "the server is going down", "shutting_down", retry_after=5) from None
    try:
        async with aclosing(_arriving(arrived)) as pieces:
            yield pieces
    finally:
        job.cancel()


async def _arriving(arrived: asyncio.Queue[Piece | Exception]) -> AsyncGenerator[Piece, None]:
    while True:
        piece = await arrived.get()
        if isinstance(piece, Exception):
            raise failure(piece)
        yield piece
        if piece.finish is not None:
            return


def failure(error: Exception) -> ApiError:
    """What a client is told; nothing of the request."""
    if isinstance(error, Closed):
        return ApiError(503, "the server is going down", "shutting_down", retry_after=5)
    return ApiError(500, f"the answer failed ({type(error).__name__})", "internal_error")
