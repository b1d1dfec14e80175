"""Opens the models and listens."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError
from ..optimizer.answers.defaults import default_sampling
from ..optimizer.answers.opened import Opened, open_model
from .settings import Settings
from .worker import Worker

_WAITING = 128  # connections before the loop runs; uvicorn gives it its own number
_GRACE = 5  # seconds that answers get when the server is stopped


def check_installed() -> None:
    """Raises UserError without the extra `serve`."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serve needs {error.name}, which is not installed; run: pip install 'mla2dsa[serve]'"
        ) from None


def serve(settings: Settings, ready: Callable[[str], None] | None = None) -> None:
    """Until it is stopped. ready: told the address once it listens. Raises UserError for models that cannot be opened, two of
    one name, and an address that is taken."""
    check_installed()
    with _listening(settings) as listening:
        workers = open_workers(settings)
        server = make_server(workers, settings)
        listening.listen(_WAITING)  # who reads the line may ask at once, before uvicorn is there to answer
        (ready or _say)(f"{', '.join(workers)} at {address(settings, listening)}")
        server.run(sockets=[listening])


def open_workers(settings: Settings) -> dict[str, Worker]:
    """By the id of their model."""
    opened: dict[str, Opened] = {}
    for model in settings.models:
        found = open_model(
            model, settings.runtime, settings.device, settings.trust_remote_code, settings.max_seq, settings.dtype
        )
        if found.name in opened:
            raise UserError(f"{model} and {opened[found.name].folder} are both called {found.name}: rename one folder")
        opened[found.name] = found
    chosen = {name: settings.sampling or default_sampling(it.folder) for name, it in opened.items()}
    return {name: Worker(it, chosen[name], settings.queue) for name, it in opened.items()}


def make_server(workers: dict[str, Worker], settings: Settings) -> Any:
    """uvicorn, which logs nothing of a request."""
    import uvicorn

    from .app import make_app

    config = uvicorn.Config(
        make_app(workers, settings), access_log=False, log_level="error", server_header=False, ws="none",
        timeout_graceful_shutdown=_GRACE, timeout_keep_alive=30, h11_max_incomplete_event_size=2**16,
    )  # fmt: skip

    class Server(uvicorn.Server):
        """Answers are ended before uvicorn waits for them, or it would break off those that take longer than it waits."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """uvicorn's own, and SIGHUP, at which it would be broken off within its loop. One that is ignored (nohup) is left so."""
            mine = threading.current_thread() is threading.main_thread()
            before = signal.getsignal(signal.SIGHUP)
            with super().capture_signals():
                if mine and before != signal.SIG_IGN:
                    signal.signal(signal.SIGHUP, self.handle_exit)
                try:
                    yield
                finally:
                    if mine:
                        signal.signal(signal.SIGHUP, before)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for worker in workers.values():
                worker.stop()
            await super().shutdown(sockets)

    return Server(config)


def _listening(settings: Settings) -> socket.socket:
    """Before the models are opened, which takes a while. Raises UserError."""
    try:
        family, *_, place = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {settings.host}: {error}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
    except OSError as error:
        made.close()
        raise UserError(f"{settings.host}:{settings.port}: {error.strerror}; pass another --host or --port") from None
    return made


def address(settings: Settings, listening: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listening.getsockname()[1]}"


def _say(what: str) -> None:
    print(f"serving {what} (for comparing, one request at a time; Ctrl-C ends it)", file=sys.stderr, flush=True)
