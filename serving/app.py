"""The routes: OpenAI's /v1/models, /v1/completions and /v1/chat/completions, and a page with two columns."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..optimizer.answers.answer import Ask, Piece
from . import replies
from .asking import ask_for, failure, pieces_of
from .guards import check_host, check_key, read_body
from .replies import Reply
from .requests import ApiError, ChatAsked, CompletionAsked, read_request
from .settings import Settings
from .worker import Worker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

Endpoint = Callable[["Request"], Awaitable["Response"]]
_LOOK = 0.2  # seconds between looks at whether a client is still there, fixed by what a person does not notice
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"
)


def make_app(workers: Mapping[str, Worker], settings: Settings) -> Starlette:
    """workers: by the id of their model. They are closed when the server goes down."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.routing import Route

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        for worker in workers.values():
            worker.close()

    api = _Api(workers, settings)
    routes = [
        Route("/v1/models", api.guarded(api.models)),
        Route("/v1/models/{name}", api.guarded(api.model)),
        Route("/v1/completions", api.guarded(api.completion), methods=["POST"]),
        Route("/v1/chat/completions", api.guarded(api.chat), methods=["POST"]),
        Route("/health", _health),
        *(Route(path, _page(*entry)) for path, entry in _PAGE.items()),
    ]
    ours = Middleware(_OurName, settings=settings)
    return Starlette(routes=routes, middleware=[ours], exception_handlers={HTTPException: _http}, lifespan=lifespan)


class _OurName:
    """What is asked of another host is refused, whatever the route, in the words of all other refusals."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import Request

        if scope["type"] == "http":
            try:
                check_host(Request(scope), self._settings)
            except ApiError as error:
                await _refused(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Api:
    def __init__(self, workers: Mapping[str, Worker], settings: Settings) -> None:
        self._workers, self._settings = workers, settings
        self._created = int(time.time())

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """`endpoint`, after the key; whatever goes wrong in it is told in OpenAI's format, and logged by nobody."""

        async def run(request: Request) -> Response:
            try:
                check_key(request, self._settings)
                return await endpoint(request)
            except ApiError as error:
                return _refused(error)
            except Exception as error:
                return _refused(failure(error))

        return run

    async def models(self, _: Request) -> Response:
        return _json(replies.model_list(list(self._workers), self._created))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._worker(name)
        return _json(replies.model_object(name, self._created))

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, CompletionAsked)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatAsked)

    async def _answer(self, request: Request, kind: type[CompletionAsked] | type[ChatAsked]) -> Response:
        from starlette.concurrency import run_in_threadpool

        asked = read_request(kind, await read_body(request, self._settings))
        worker = self._worker(asked.model)
        ask = await run_in_threadpool(ask_for, worker, asked, self._settings.max_tokens)
        reply = Reply(asked.model, kind is ChatAsked, len(ask.ids))
        if asked.stream:
            return await _streamed(worker, ask, reply, asked.with_usage)
        whole = asyncio.ensure_future(_gathered(worker, ask))
        try:
            while not whole.done() and not await request.is_disconnected():
                await asyncio.wait([whole], timeout=_LOOK)
            if not whole.done():
                raise ApiError(400, "the client has left")  # nobody is there to read it
            return _json(reply.whole(await whole))
        finally:
            whole.cancel()  # who has left is not answered on, and keeps no place among those that wait

    def _worker(self, name: str) -> Worker:
        if name not in self._workers:
            raise ApiError(404, f"no such model here; there is {', '.join(self._workers)}", "model_not_found", "model")
        return self._workers[name]


async def _gathered(worker: Worker, ask: Ask) -> list[Piece]:
    async with pieces_of(worker, ask) as arriving:
        return [piece async for piece in arriving]


async def _streamed(worker: Worker, ask: Ask, reply: Reply, with_usage: bool) -> Response:
    """The first piece is waited for, so that a full queue is a status and no event."""
    from starlette.responses import StreamingResponse

    source = _events(worker, ask, reply, with_usage)
    first = await anext(source)

    async def events() -> AsyncIterator[str]:
        try:
            yield first
            async for event in source:
                yield event
        finally:
            await source.aclose()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(worker: Worker, ask: Ask, reply: Reply, with_usage: bool) -> Any:
    async with pieces_of(worker, ask) as arriving:
        yield ": taken\n\n"  # a comment: the queue has it
        for chunk in reply.first():
            yield _event(chunk)
        try:
            async for piece in arriving:
                if (told := reply.chunk(piece)) is not None:
                    yield _event(told)
        except ApiError as error:
            yield _event(error.body())
            return
    if with_usage:
        yield _event(reply.last())
    yield "data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _json(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(dict(value), status, headers=dict(headers or {}))


def _refused(error: ApiError) -> Response:
    after = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return _json(error.body(), error.status, after)


async def _http(_: Request, error: Any) -> Response:
    """Starlette's own 404 and 405."""
    return _json(ApiError(error.status_code, str(error.detail)).body(), error.status_code, error.headers)


async def _health(_: Request) -> Response:
    return _json({"status": "ok"})


def _page(name: str, kind: str) -> Endpoint:
    from starlette.responses import Response

    content = (Path(__file__).parent / name).read_bytes()

    async def page(_: Request) -> Response:
        return Response(
            content, media_type=kind, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        )

    return page
