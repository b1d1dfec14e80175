"""Processes that share one conversion, as torchrun starts them; without torchrun there is one, and nothing here does anything.

All run the same program. Each streams every n-th sequence; process 0 alone writes, prints and decides, and the others do what
it says. Whatever a process waits for here, it looks meanwhile whether another one has failed: then it fails, too. How they end
is agreed on: with the exit code of the first error, which one of them tells.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_POLL = 0.1  # seconds between looks at what the others say, fixed by what a person does not notice
# Fixed by torchrun, which kills the others 30 seconds after it has asked them to end.
_PATIENCE = 5.0  # seconds that a failed process waits for the others to take notice
_WORK = timedelta(days=365)  # fixed by nothing: how long one process may work while others wait is the model's affair
_FAILED, _TOLD, _ENDED = "failed", "told", "ended"


class ElsewhereError(UserError):
    """Another process of this run failed. The message is that process's; exit_code, too."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Processes:
    """rank: the number of this one; count: of all. local, beside: the same on this machine. store: what all of them see."""

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0, beside: int = 1, store: Any = None) -> None:
        self.rank, self.count, self.local, self.beside, self._store = rank, count, local, beside, store

    @property
    def first(self) -> bool:
        """Whether this is the one that writes, prints and decides."""
        return self.rank == 0

    def own(self, total: int) -> range:
        """The numbers, of `total` sequences, that are this process's."""
        return range(self.rank, total, self.count)

    def gathered(self, value: T) -> list[T]:
        """What every process gives, by rank. Raises ElsewhereError when one of them has failed, as all that wait do."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count

        def gather() -> None:
            from torch import distributed

            distributed.all_gather_object(found, value)

        self._meanwhile(gather)
        return found

    def in_order(self, own: Sequence[T]) -> list[T]:
        """Results of all sequences, from those that each process has of its `own`."""
        parts = self.gathered(list(own))
        total = sum(map(len, parts))
        return [parts[number % self.count][number // self.count] for number in range(total)]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in process 0, in every process."""
        if self.count == 1:
            return make()
        held: list[Any] = [make() if self.first else None]

        def spread() -> None:
            from torch import distributed

            distributed.broadcast_object_list(held, 0)

        self._meanwhile(spread)
        found: T = held[0]
        return found

    def wait(self) -> None:
        """Until every process is here."""
        self.gathered(None)

    def swapped(self, given: Tensor | None, to: int, taken: Tensor | None, source: int) -> None:
        """Gives `given` to process `to` while `taken` is filled with what process `source` gives; None: nothing."""
        wanted = [
            (name, tensor.contiguous(), other)
            for name, tensor, other in (("isend", given, to), ("irecv", taken, source))
            if tensor is not None and tensor.numel()
        ]

        def swap() -> None:
            from torch import distributed

            works = [distributed.P2POp(getattr(distributed, name), tensor, other) for name, tensor, other in wanted]
            for work in distributed.batch_isend_irecv(works):
                work.wait()

        if wanted:
            self._meanwhile(swap)

    def agreed(self, lines: Sequence[str], code: int) -> tuple[Sequence[str], int]:
        """(lines to tell, exit code) of a process that fails with these. One that fails of itself has the others fail."""
        if self.count == 1:
            return lines, code
        if current_thread() is main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):  # torchrun's, once another one has ended
                signal.signal(number, signal.SIG_IGN)
        try:
            return self._agreed(lines, code)
        except RuntimeError:  # torchrun is gone, and with it what all of them see
            return lines, code

    def end(self) -> None:
        """When all is well: every process is through."""
        if self.count > 1:
            from torch import distributed

            self.wait()
            distributed.destroy_process_group()

    def _agreed(self, lines: Sequence[str], code: int) -> tuple[Sequence[str], int]:
        stopped = code >= 128
        if stopped and not self.first:  # a signal comes to all, and process 0 knows what is kept
            self._until(lambda: self._store.check([_FAILED]))
        mine = json.dumps([self.rank, code, list(lines)])
        rank, code, said = json.loads(self._store.compare_set(_FAILED, "", mine))
        if not self.first:
            self._until(lambda: self._store.add(_TOLD, 0) > 0)
        elif stopped and rank != self.rank:
            lines = _named(rank, said)
        if self._store.add(_TOLD, 1) > 1:
            lines = []
        self._store.add(_ENDED, 1)
        self._until(lambda: self._store.add(_ENDED, 0) >= self.count)
        return lines, code

    def _meanwhile(self, call: Callable[[], None]) -> None:
        """`call`, which waits for other processes, in a thread of its own: one that has failed would be waited for in vain."""
        failures = list[Exception]()

        def run() -> None:
            try:
                _use_own_gpu(self.local)
                call()
            except Exception as error:
                failures.append(error)

        thread = Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL)
            self._look()
        if failures:
            self._until(self._look)
            reason = (str(failures[0]).splitlines() or [type(failures[0]).__name__])[0]
            raise UserError(
                f"a process of this run ended without a word, or cannot be reached ({reason}); start it again"
            )

    def _look(self) -> bool:
        """False. Raises ElsewhereError when another process has failed."""
        try:
            if not self._store.check([_FAILED]):
                return False
            rank, code, said = json.loads(self._store.get(_FAILED))
        except RuntimeError as error:
            raise UserError("torchrun, which started this process, is gone; start it again") from error
        raise ElsewhereError("; ".join(_named(rank, said)), code)

    def _until(self, seen: Callable[[], bool]) -> None:
        limit = time.monotonic() + _PATIENCE
        while not seen() and time.monotonic() < limit:
            time.sleep(_POLL)


_CURRENT = Processes()


def processes() -> Processes:
    """Those that this one belongs to."""
    return _CURRENT


def several() -> bool:
    """Whether torchrun has started more than one."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def join_processes() -> None:
    """Find the others, if there are any. Raises UserError when they cannot be reached."""
    global _CURRENT
    if not several() or _CURRENT.count > 1:
        return
    from torch import cuda, distributed
    from torch.distributed.rendezvous import rendezvous

    local, beside = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, rank, count = next(rendezvous("env://"))
        seen = distributed.distributed_c10d.PrefixStore(f"mla2dsa-{attempt}", store)
        _CURRENT = Processes(rank, count, local, beside, seen)
        _use_own_gpu(local)
        backend = "cpu:gloo,cuda:nccl" if cuda.is_available() else "gloo"
        inside = distributed.distributed_c10d.PrefixStore("group", seen)
        group = {"store": inside, "rank": rank, "world_size": count, "timeout": _WORK}
        _CURRENT._meanwhile(lambda: distributed.init_process_group(backend, **group))
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the processes that torchrun started cannot reach each other ({reason})") from error


def _use_own_gpu(local: int) -> None:
    """What a thread does with "cuda" goes to the GPU of its process."""
    from torch import cuda

    if local < cuda.device_count():
        cuda.set_device(local)


def _named(rank: int, lines: Sequence[str]) -> list[str]:
    first, *others = lines or ["ended"]
    return [f"process {rank}: {first}", *others]
