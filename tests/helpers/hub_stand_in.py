"""A hub of models on this machine: the few requests that huggingface_hub makes, answered from a folder, and noted down."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """sent: bytes of each file that went over the wire."""

    folder: Path
    model: str
    sent: dict[str, int] = field(default_factory=dict)
    endpoint: str = ""


@contextmanager
def hub_of(folder: Path, model: str = "owner/name") -> Iterator[Hub]:
    """The hub, with `folder` as its only model; every other one is not found."""
    hub = Hub(folder, model)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{model}"):
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir()) if file.is_file()]
                self._send(200, json.dumps({"id": model, "sha": COMMIT, "siblings": files}).encode(), body)
                return
            name = path.rpartition("/")[2]
            if not path.startswith(f"/{model}/resolve/") or not (folder / name).is_file():
                self.send_response(404)
                missing = "EntryNotFound" if path.startswith(f"/{model}/") else "RepoNotFound"
                self.send_header("X-Error-Code", missing)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = (folder / name).read_bytes()
            asked = self.headers.get("Range")
            if asked:
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                content = content[int(begin) : int(end) + 1]
            if body:
                hub.sent[name] = hub.sent.get(name, 0) + len(content)
            self._send(206 if asked else 200, content, body)

        def _send(self, code: int, content: bytes, body: bool) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
