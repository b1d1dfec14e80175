"""One thread a model, which answers one request after another; what waits is bounded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from ..optimizer.answers.answer import Ask, Piece, answer
from ..optimizer.answers.opened import Opened
from ..optimizer.answers.prompts import Message, chat_ids, text_ids
from ..runtime.generation import Sampling

Emit = Callable[[Piece | Exception], None]


class Busy(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The server is going down."""


class Job:
    """A request that waits or is answered. Cancelled, it ends at the next token, or never starts."""

    def __init__(self, ask: Ask, emit: Emit) -> None:
        self.ask, self.emit = ask, emit
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


class Worker:
    """`emit` of a job is called in the worker's thread: with each piece, the last of which has a `finish`, or with what was
    raised. sampling: of a request that says nothing of it."""

    def __init__(self, opened: Opened, sampling: Sampling, waiting: int) -> None:
        self.opened, self.sampling = opened, sampling
        self._most, self._jobs = waiting, deque[Job]()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._tokenizing = threading.Lock()  # tokenizers' objects may not be read while transformers sets them up
        self._thread = threading.Thread(target=self._run, name=f"answers of {opened.name}", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, emit: Emit) -> Job:
        """Raises Busy or Closed."""
        job = Job(ask, emit)
        with self._changed:
            if self._closed.is_set():
                raise Closed
            waiting = [it for it in self._jobs if not it.cancelled]  # who has left keeps no place
            if len(waiting) >= self._most:
                raise Busy
            self._jobs = deque([*waiting, job])
            self._changed.notify()
        return job

    @property
    def waits(self) -> int:
        """How many requests wait."""
        return len(self._jobs)

    def text_ids(self, prompt: str) -> list[int]:
        with self._tokenizing:
            return text_ids(self.opened, prompt)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Raises UserError for a model without a chat template, or messages that it does not take."""
        with self._tokenizing:
            return chat_ids(self.opened, messages)

    def stop(self) -> None:
        """What is being answered ends at the next token, and what waits is told. Does not wait for it."""
        with self._changed:
            self._closed.set()
            waiting, self._jobs = self._jobs, deque()
            self._changed.notify()
        for job in waiting:
            job.emit(Closed())

    def close(self, seconds: float = 5.0) -> None:
        """Stopped, and waited for."""
        self.stop()
        self._thread.join(seconds)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._answer(job)
            except Exception as error:  # it is the client's to hear, and the next job's turn
                job.emit(error)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed.is_set())
            return self._jobs.popleft() if self._jobs else None

    def _answer(self, job: Job) -> None:
        if job.cancelled:
            return
        for piece in answer(self.opened, job.ask):
            if self._closed.is_set():
                raise Closed
            job.emit(piece)
            if job.cancelled:
                return
