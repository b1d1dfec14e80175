"""The server on loopback with two models, in a thread of the tests."""

from __future__ import annotations

import copy
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from chatty import chatty_model, open_once
from openai import OpenAI

from mla2dsa.optimizer.answers.opened import open_model
from mla2dsa.runtime.generation import Sampling
from mla2dsa.serving.server import make_server
from mla2dsa.serving.settings import Settings
from mla2dsa.serving.worker import Worker

KEY = "sk-tests"
SETTINGS = Settings(("a", "b"), api_key=KEY, max_body=20_000, max_tokens=200, queue=20)


@dataclass(frozen=True)
class Running:
    url: str
    folder: Path
    workers: dict[str, Worker]

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, **{"max_retries": 0, "timeout": 120, **options})

    def post(self, path: str, **request: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **request.pop("headers", {})}
        return httpx2.post(self.url + path, headers=headers, timeout=600, **request)


@contextmanager
def two_models(factory: pytest.TempPathFactory, waiting: int = 1) -> Iterator[Running]:
    """Two models, `a` and `b`, of which b has no chat template and lets so many requests wait."""
    folder = chatty_model(factory)
    with pytest.MonkeyPatch.context() as patch:
        open_once(patch)
        first, second = open_model(str(folder)), open_model(str(folder))
    second.tokenizer.chat_template = None
    twin: Any = copy.copy(first.session)  # the weights are shared, the caches are not
    twin._caches = copy.deepcopy(twin._caches)
    second = replace(second, session=twin)
    workers = {"a": Worker(first, Sampling(), SETTINGS.queue), "b": Worker(second, Sampling(), waiting)}
    server = make_server(workers, SETTINGS)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Running(url, folder, workers)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
