"""What is looked at before a request is read: its key, where it comes from, its kind and its size."""

from __future__ import annotations

import asyncio
import hmac
import re
from typing import TYPE_CHECKING

from .requests import ApiError
from .settings import Settings

if TYPE_CHECKING:
    from starlette.requests import Request

_OURS = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?", re.IGNORECASE)


def check_key(request: Request, settings: Settings) -> None:
    """Raises ApiError 401."""
    if settings.api_key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), settings.api_key.encode()):
        raise ApiError(401, "no API key, or not the one that this server was started with", "invalid_api_key")


def check_host(request: Request, settings: Settings) -> None:
    """Raises ApiError 400: a name that another site gave this address would let its pages read what is answered here."""
    named = request.headers.getlist("host")
    if settings.is_local and not (len(named) == 1 and _OURS.fullmatch(named[0])):
        raise ApiError(
            400, "the Host header names another host; this server answers as localhost and 127.0.0.1", "invalid_host"
        )


async def read_body(request: Request, settings: Settings) -> bytes:
    """Raises ApiError 415 for what is no JSON (a page of another site could send it unasked), 413, 408."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "expected the content type application/json", "unsupported_media_type")
    try:
        async with asyncio.timeout(settings.body_seconds):
            return await _limited(request, settings.max_body)
    except TimeoutError:
        raise ApiError(408, f"the body was not there after {settings.body_seconds:g} s", "timeout") from None


async def _limited(request: Request, most: int) -> bytes:
    too_long = ApiError(413, f"the body is longer than {most} bytes", "body_too_long")
    told = request.headers.get("content-length", "0")
    if not told.isdigit() or int(told) > most:
        raise too_long
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_long
        parts.append(part)
    return b"".join(parts)
