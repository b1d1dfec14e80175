"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from ..runtime.generation import Sampling

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """models: folders. queue: requests that may wait for a model. max_seq: most tokens of prompt and answer, None: the model's.
    sampling: of requests that say nothing of it, None: as each model's generation_config.json says. dtype: of checkpoints, None: float32.
    body_seconds: in which a body has to be there."""

    models: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_body: int = 2**20
    max_tokens: int = 1024
    max_seq: int | None = None
    queue: int = 64
    sampling: Sampling | None = None
    runtime: str | None = None
    device: str = "cpu"
    trust_remote_code: bool = False
    dtype: str | None = None
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}, expected a number from 0 (any that is free) to 65535")
        for name in ("max_body", "max_tokens", "queue"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}, expected at least 1")
        if self.max_seq is not None and self.max_seq < 1:
            raise UsageError(f"--max-seq {self.max_seq}, expected at least 1")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError("--api-key is empty or not printable ASCII, which no header can carry")

    @property
    def is_local(self) -> bool:
        return self.host in LOOPBACK
