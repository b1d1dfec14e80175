"""Threads in the place of processes that torchrun starts: what one gives, the others get, in this process."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from typing import TypeVar

from torch import Tensor

from mla2dsa.runtime.processes import Processes

T = TypeVar("T")
SECONDS = 20.0  # until a thread that waits in vain gives up
_OWN = local()


class Threads:
    """A room for `count` of them."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.slots = count, Barrier(count), [None] * count
        self.sent: dict[tuple[int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)

    def run(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in each, by rank."""

        def one(rank: int) -> T:
            _OWN.processes = _Thread(rank, self)
            return work()

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


def own() -> Processes:
    """What `processes()` is to say in a thread."""
    found: Processes = _OWN.processes
    return found


class _Thread(Processes):
    def __init__(self, rank: int, room: Threads) -> None:
        super().__init__(rank, room.count)
        self._room = room

    def gathered(self, value: T) -> list[T]:
        self._room.slots[self.rank] = value  # type: ignore[call-overload]
        self._room.barrier.wait(SECONDS)
        found: list[T] = list(self._room.slots)  # type: ignore[arg-type]
        self._room.barrier.wait(SECONDS)
        return found

    def swapped(self, given: Tensor | None, to: int, taken: Tensor | None, source: int) -> None:
        if given is not None:
            self._room.sent[self.rank, to].put(given.clone())
        if taken is not None:
            taken.copy_(self._room.sent[source, self.rank].get(timeout=SECONDS))
