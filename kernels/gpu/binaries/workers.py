"""Kernels compiled by several processes, which end at once with the one that asked.

Not a pool of `concurrent.futures`: that cannot be left before all that has been handed out is compiled, and hangs when a process of
it is killed while it hands over a result. Here each process has a pipe of its own and one kernel at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from ....errors import UserError
from ....files.system_calls import die_with_parent
from ..programs.program import Variant
from .cache import compile_cached
from .compile import Compiled

Task = tuple[Variant, int]


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection


def compiled_by(processes: int, tasks: Sequence[Task]) -> Iterator[tuple[Task, Compiled]]:
    """Binaries as they are made, in any order. Raises what compiling one raises, UserError when a process is killed."""
    waiting, at_work = deque(tasks), dict[Connection, Task]()
    workers: list[_Worker] = []
    try:
        for _ in range(min(max(processes, 1), len(tasks))):
            with _uninterrupted():  # one that is not in the list yet would not be ended
                workers.append(_started())
        process_of = {worker.pipe: worker.process for worker in workers}
        for pipe in process_of:
            at_work[pipe] = _give(pipe, waiting)
        while at_work:
            ready = wait(list(at_work))
            for pipe in [pipe for pipe in at_work if pipe in ready]:
                task = at_work.pop(pipe)
                compiled = _received(pipe, process_of[pipe], task)
                if waiting:
                    at_work[pipe] = _give(pipe, waiting)
                yield task, compiled
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()


def _started() -> _Worker:
    # Fresh processes: a fork of one that has run torch may hang.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()  # so that ours ends when the process does
    return _Worker(process, ours)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """What is started in it is only ever killed: a signal that is sent to all (Ctrl-C) is for the asking process, which ends them.

    The first process that is started brings multiprocessing's resource tracker along, which unblocks signals: so that comes before.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _give(pipe: Connection, waiting: deque[Task]) -> Task:
    task = waiting.popleft()
    with contextlib.suppress(OSError):  # the process is gone, which is seen when it is asked for the result
        pipe.send(task)
    return task


def _received(pipe: Connection, process: SpawnProcess, task: Task) -> Compiled:
    try:
        found: Any = pipe.recv()
    except (EOFError, OSError):
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        mend = "if memory was short, use fewer --jobs" if killed else "use --jobs 1"
        raise UserError(
            f"{task[0].kernel} for sm_{task[1]}: the process that compiled it ended with exit code {process.exitcode}; {mend}"
        ) from None
    if isinstance(found, BaseException):
        raise found
    assert isinstance(found, Compiled)
    return found


def _sendable(error: Exception) -> Exception:
    """Not every exception can be made again of what it is written as."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _work(pipe: Connection, parent: int) -> None:
    die_with_parent(parent)
    try:
        while True:
            variant, sm = pipe.recv()
            try:
                done: Compiled | Exception = compile_cached(variant, sm)
            except Exception as error:  # whatever it is, it is the asking process's to tell
                done = _sendable(error)
            pipe.send(done)
    except (EOFError, OSError):  # the asking process has what it wants, or is gone
        return
