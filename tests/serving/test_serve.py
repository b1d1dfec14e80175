"""The server on loopback, asked by OpenAI's own client: lists, completions, chats, streams, stops, two models, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx2
import openai
import pytest
from chatty import greedy
from served import KEY, SETTINGS, Running, two_models

from mla2dsa.optimizer.answers.answer import Ask, Piece
from mla2dsa.runtime.generation import Sampling
from mla2dsa.serving import server
from mla2dsa.serving.server import make_server
from mla2dsa.serving.worker import Busy, Worker

PROMPT, COUNT = "def main():\n    return", 12
MESSAGES: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "sort a list"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with two_models(tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="module")
def expected(running: Running) -> str:
    ids = running.workers["a"].text_ids(PROMPT)
    return greedy(running.folder, ids, COUNT)


def complete(running: Running, model: str = "a", **options: Any) -> Any:
    return running.client().completions.create(model=model, prompt=PROMPT, **{"max_tokens": COUNT, **options})


def test_models_are_listed(running: Running) -> None:
    assert [model.id for model in running.client().models.list()] == ["a", "b"]
    assert running.client().models.retrieve("b").id == "b"


@pytest.mark.parametrize("model", ["a", "b"])
def test_a_completion_is_what_transformers_says(running: Running, expected: str, model: str) -> None:
    told = complete(running, model)
    assert (told.model, told.choices[0].text, told.choices[0].finish_reason) == (model, expected, "length")
    prompt = len(running.workers["a"].text_ids(PROMPT))
    assert told.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": prompt,
        "completion_tokens": COUNT,
        "total_tokens": prompt + COUNT,
    }


def test_a_stream_is_the_same_text(running: Running, expected: str) -> None:
    chunks = list(complete(running, stream=True, stream_options={"include_usage": True}))
    *texts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in texts) == expected
    assert len(texts) > 3
    assert [chunk.choices[0].finish_reason for chunk in texts if chunk.choices[0].finish_reason] == ["length"]
    assert last.choices == []
    assert last.usage.completion_tokens == COUNT
    assert len({chunk.id for chunk in chunks}) == 1


def test_tokens_are_a_prompt_too(running: Running, expected: str) -> None:
    ids = running.workers["a"].text_ids(PROMPT)
    told = running.client().completions.create(model="a", prompt=ids, max_tokens=COUNT)
    assert told.choices[0].text == expected


def test_a_chat_whole_and_streamed(running: Running) -> None:
    ids = running.workers["a"].chat_ids(MESSAGES)
    ask: Any = {"model": "a", "messages": MESSAGES, "max_completion_tokens": COUNT}
    client = running.client()
    told = client.chat.completions.create(**ask)
    assert told.choices[0].message.content == greedy(running.folder, ids, COUNT)
    assert told.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == told.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stop(running: Running, expected: str, stream: bool) -> None:
    stop = expected[4:7]
    told = complete(running, stop=["never said", stop], stream=stream)
    choices = [chunk.choices[0] for chunk in told] if stream else [told.choices[0]]
    assert "".join(choice.text for choice in choices) == expected[: expected.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_a_seed_is_the_same_text_again(running: Running) -> None:
    texts = [complete(running, temperature=1.5, seed=seed).choices[0].text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    assert (
        complete(running, temperature=1.5, extra_body={"top_k": 1}).choices[0].text == complete(running).choices[0].text
    )


def test_logprobs(running: Running) -> None:
    columns = complete(running, logprobs=3).choices[0].logprobs
    assert len(columns.tokens) == len(columns.token_logprobs) == len(columns.text_offset) == COUNT
    for token, logprob, top in zip(columns.tokens, columns.token_logprobs, columns.top_logprobs, strict=True):
        assert len(top) <= 3
        assert logprob <= 0
        assert math.isclose(max(top.values()), logprob)  # greedy
        assert token in top
    ask: Any = {"model": "a", "messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    content = running.client().chat.completions.create(**ask).choices[0].logprobs.content  # type: ignore[union-attr]
    assert [len(entry.top_logprobs) for entry in content or []] == [2] * 4
    streamed = list(running.client().chat.completions.create(**ask, stream=True))
    told = [entry for chunk in streamed if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert told == content


BASE = {"model": "a", "prompt": "x"}
CHAT = {"model": "a", "messages": [{"role": "user", "content": "x"}]}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        (COMPLETIONS, b"{", 400, "not JSON"),
        (COMPLETIONS, b"\xff", 400, "not JSON"),
        (COMPLETIONS, b"[" * 9000, 400, "not JSON"),
        (COMPLETIONS, b"[]", 400, "expected an object"),
        (COMPLETIONS, {"model": "a"}, 400, "prompt is missing"),
        (COMPLETIONS, {"prompt": "x"}, 400, "model is missing"),
        (COMPLETIONS, {**BASE, "model": "c"}, 404, "there is a, b"),
        (COMPLETIONS, {**BASE, "prompt": ""}, 400, "no tokens"),
        (COMPLETIONS, {**BASE, "prompt": ["x", "y"]}, 400, "prompt"),
        (COMPLETIONS, {**BASE, "prompt": [1, 99999]}, 400, "from 0 to 1023"),
        (COMPLETIONS, {**BASE, "prompt": "x " * 3000}, 400, "the context holds 1024"),
        (COMPLETIONS, {**BASE, "prompt": "x" * 30_000}, 413, "longer than 20000 bytes"),
        (COMPLETIONS, {**BASE, "max_tokens": 0}, 400, "max_tokens"),
        (COMPLETIONS, {**BASE, "max_tokens": 201}, 400, "at most 200"),
        (COMPLETIONS, {**BASE, "max_tokens": "5"}, 400, "max_tokens"),
        (COMPLETIONS, {**BASE, "temperature": -1}, 400, "temperature"),
        (COMPLETIONS, b'{"model": "a", "prompt": "x", "temperature": NaN}', 400, "temperature"),
        (COMPLETIONS, {**BASE, "n": 2}, 400, "n: Input should be less than or equal to 1"),
        (COMPLETIONS, {**BASE, "n": True}, 400, "n: Input should be a valid integer"),
        (COMPLETIONS, {**BASE, "n": 1.0}, 400, "n: Input should be a valid integer"),
        (COMPLETIONS, {**BASE, "best_of": True}, 400, "best_of: Input should be a valid integer"),
        (COMPLETIONS, {**BASE, "echo": 0}, 400, "echo: Input should be a valid boolean"),
        (COMPLETIONS, {**BASE, "echo": True}, 400, "echo: Input should be false"),
        (COMPLETIONS, {**BASE, "max_tokens": int("9" * 4000)}, 400, "max_tokens is a number of 13288 bits, this server gives at most 200"),
        (COMPLETIONS, {**BASE, "presence_penalty": 0.5}, 400, "presence_penalty"),
        (COMPLETIONS, {**BASE, "logprobs": 6}, 400, "logprobs"),
        (COMPLETIONS, {**BASE, "stop": ["a"] * 5}, 400, "stop"),
        (COMPLETIONS, {**BASE, "seed": 2**70}, 400, "seed"),
        (COMPLETIONS, {**BASE, "colour": "red"}, 400, "colour is not taken"),
        (CHATS, {**CHAT, "messages": []}, 400, "messages"),
        (CHATS, {**CHAT, "messages": [{"role": "wizard", "content": "x"}]}, 400, "messages"),
        (CHATS, {**CHAT, "messages": [{"role": "user"}]}, 400, "messages[0].content is missing"),
        (CHATS, {**CHAT, "messages": [*CHAT["messages"], {**CHAT["messages"][0], "calls": 1}]}, 400, "messages[1].calls is not"),
        (CHATS, {**CHAT, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "messages[0].content[0].type: "),
        (CHATS, {**CHAT, "messages": [{"role": "user", "content": "a\ud800"}]}, 400, "half a character (a surrogate) at place 1"),
        (COMPLETIONS, {**BASE, "prompt": "\ud800"}, 400, "half a character (a surrogate) at place 0"),
        (COMPLETIONS, {**BASE, "prompt": []}, 400, "prompt: List should have at least 1 item"),
        (COMPLETIONS, {**BASE, "prompt": 5}, 400, "prompt: Input should be a valid string"),
        (COMPLETIONS, {**BASE, "stream_options": {"colour": 1}}, 400, "stream_options.colour is not taken"),
        (CHATS, {**CHAT, "model": "b"}, 400, "no chat template"),
        (CHATS, {**CHAT, "tools": []}, 400, "tools is not taken"),
        ("/v1/embeddings", BASE, 404, "Not Found"),
        ("/v1/models", BASE, 405, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_refusals(running: Running, path: str, body: Any, status: int, part: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = running.post(path, content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert part in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300
    assert str(running.folder.parent) not in answer.text
    assert error["type"] == "invalid_request_error"


def test_the_client_has_its_own_names_for_it(running: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="there is a, b"):
        complete(running, "c")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        complete(running, max_tokens=0)
    with pytest.raises(openai.AuthenticationError, match="no API key"):
        running.client().with_options(api_key="sk-other").models.list()


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        pytest.param({"Content-Type": "text/plain"}, 415, "unsupported_media_type", id="a-form-of-another-site"),
        pytest.param({"Authorization": ""}, 401, "invalid_api_key", id="no-key"),
        *(
            pytest.param({"Host": host}, 400, "invalid_host", id=f"host {host}")
            for host in (
                "evil.example",
                "localhost.evil.example:80",
                "127.0.0.1@evil.example",
                "::1",
                "localhost:x",
                "",
            )
        ),
    ],
)
def test_headers_that_are_refused(running: Running, headers: dict[str, str], status: int, code: str) -> None:
    answer = running.post(COMPLETIONS, content=json.dumps(BASE), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nowhere"])
def test_another_host_is_told_so_on_every_route(running: Running, path: str) -> None:
    answer = httpx2.get(running.url + path, headers={"Host": "evil.example"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_host")
    for name in ("localhost", "LOCALHOST:1", "[::1]:8000", "127.0.0.1"):
        assert httpx2.get(f"{running.url}/health", headers={"Host": name}).status_code == 200


def test_a_body_without_a_length_is_limited(running: Running) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 1000

    assert running.post(COMPLETIONS, content=parts()).status_code == 413
    assert complete(running, max_tokens=1).usage.completion_tokens == 1


def test_a_full_queue_is_told(running: Running) -> None:
    """Model b lets one wait, and is held up: the first client waits, the second is sent away, and afterwards all goes on."""
    started, go_on = threading.Event(), threading.Event()

    def hold(_: Piece | Exception) -> None:
        started.set()
        go_on.wait(120)

    running.workers["b"].submit(Ask((1,), 1, Sampling()), hold)
    assert started.wait(120)
    stream = complete(running, "b", stream=True)
    with pytest.raises(openai.RateLimitError, match="try again") as refused:
        complete(running, "b")
    go_on.set()
    assert refused.value.response.headers["retry-after"] == "1"
    assert len([chunk for chunk in stream if chunk.choices[0].text]) > 3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_who_leaves_while_waiting_keeps_no_place(running: Running, stream: bool) -> None:
    started, go_on = threading.Event(), threading.Event()

    def hold(_: Piece | Exception) -> None:
        started.set()
        go_on.wait(120)

    worker = running.workers["b"]
    worker.submit(Ask((1,), 1, Sampling()), hold)
    assert started.wait(120)
    body = {**BASE, "model": "b", "stream": stream}
    asked: Any = {"json": body, "headers": {"Authorization": f"Bearer {KEY}"}, "timeout": 1}
    try:
        # the headers of a stream come at once, its pieces do not
        with (
            pytest.raises(httpx2.TimeoutException),
            httpx2.stream("POST", running.url + COMPLETIONS, **asked) as answer,
        ):
            answer.read()
        limit, job = time.monotonic() + 30, None
        while job is None:  # the server takes notice a moment later
            assert time.monotonic() < limit
            with contextlib.suppress(Busy):
                job = worker.submit(Ask((1,), 1, Sampling()), lambda _: None)
            time.sleep(0.05)
        job.cancel()
    finally:
        go_on.set()


def test_a_server_that_is_stopped_ends_its_answers(running: Running) -> None:
    """What is being written, and what waits, hears so; uvicorn's patience is not used up."""
    first = running.workers["a"]
    twin: Any = copy.copy(first.opened.session)
    twin._caches = copy.deepcopy(twin._caches)
    workers = {"a": Worker(replace(first.opened, session=twin), Sampling(), 2)}
    server = make_server(workers, SETTINGS)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        other = Running(f"http://127.0.0.1:{listening.getsockname()[1]}", running.folder, workers)
        stream = iter(complete(other, "a", max_tokens=200, stream=True))
        next(stream)
        found = list[int]()
        waiting = threading.Thread(
            target=lambda: found.append(other.post(COMPLETIONS, content=json.dumps(BASE)).status_code)
        )
        waiting.start()
        limit = time.monotonic() + 60
        while not workers["a"].waits and time.monotonic() < limit:
            time.sleep(0.01)
        server.should_exit = True
        with pytest.raises(openai.APIError, match="going down"):
            list(stream)
        for it in (waiting, thread):
            it.join(30)
        assert not thread.is_alive()
    assert found == [503]


def test_who_leaves_is_not_answered_on(running: Running) -> None:
    stream = complete(running, "b", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    assert complete(running, "b", max_tokens=1).usage.completion_tokens == 1


def test_sixteen_clients_at_once_and_nothing_is_mixed(running: Running) -> None:
    """Each asks with a prompt of its own, streaming, and gets what it gets when it is alone."""
    begins = "import |class |for i in |while |return |if self.|try:\n    |with |assert |raise |print(|# The|x = [|@|lambda |def _"
    prompts = begins.split("|")
    client = running.client()

    def ask(prompt: str) -> str:
        stream = client.completions.create(model="a", prompt=prompt, max_tokens=6, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    alone = [ask(prompt) for prompt in prompts]
    together = [[""] * 16 for _ in range(2)]

    def ask_twice(number: int) -> None:
        for round_ in together:
            round_[number] = ask(prompts[number])

    threads = [threading.Thread(target=ask_twice, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert together == [alone, alone]
    assert len(set(alone)) > 10


def test_it_can_be_asked_as_soon_as_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def ready(said: str) -> None:
        told.append(said)
        host, port = said.rpartition("//")[2].split(":")
        socket.create_connection((host, int(port)), timeout=10).close()

    monkeypatch.setattr(server, "open_workers", lambda settings: {"a": None})
    monkeypatch.setattr(server, "make_server", lambda workers, settings: SimpleNamespace(run=lambda sockets: None))
    server.serve(replace(SETTINGS, port=0), ready)
    assert [said.split(" at ")[0] for said in told] == ["a"]


def test_the_page(running: Running) -> None:
    page = httpx2.get(running.url)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("page.js", "page.css"):
        assert f'"/{name}"' in page.text
        assert httpx2.get(f"{running.url}/{name}").status_code == 200
    assert httpx2.get(f"{running.url}/health").json() == {"status": "ok"}
