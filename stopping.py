"""Signals that ask a command to end, and are heard.

A signal handler's exception is a wish that anybody may drop: C code that clears errors, a weak reference's callback, a bare
`except` of a library. The command would go on as if nobody had asked. So the wish is repeated until the command has ended, but
not while it is being fulfilled: what clears up is left alone.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AT_ONCE = 2.0  # seconds in which a second signal is the same wish: fixed by an impatient finger, and by supervisors that send two
_AGAIN = 0.25  # seconds between a wish and the next, fixed by what a person who pressed Ctrl-C does not notice


class Stop:
    """What has been asked for. A second signal, later, is the wish to end without clearing up; but not with `once`, where
    who asks sends every signal twice."""

    def __init__(self, once: bool = False) -> None:
        self._once = once
        self._first: int | None = None
        self._since = 0.0
        self._over = False
        self._is_repeated = False

    @property
    def asked_for(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    @property
    def number(self) -> int:
        """Of the first signal that came; Ctrl-C's where a library has heard it in our place."""
        return self._first or signal.SIGINT

    def over(self) -> None:
        """From now on nothing can be stopped any more: what is left to do is to say how it ended."""
        self._over = True

    def hear(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler. Raises KeyboardInterrupt where the command is to end."""
        repeated, self._is_repeated = self._is_repeated, False
        if self._first is None:
            self._first, self._since = number, time.monotonic()
            # Not threading's: that one takes a lock, and what the signal has interrupted may hold it.
            _thread.start_new_thread(self._repeat, (signal.Signals(number),))
        elif not repeated and (self._once or time.monotonic() < self._since + _AT_ONCE):
            repeated = True
        if self._over or (repeated and _on_its_way()) or _importing_torch(frame):
            return
        raise KeyboardInterrupt

    def _repeat(self, number: signal.Signals) -> None:
        while True:
            time.sleep(_AGAIN)
            if self._over:
                return
            self._is_repeated = True
            _thread.interrupt_main(number)


def _on_its_way() -> bool:
    """Whether the exception that is being handled is a wish to end, or what came of one."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _importing_torch(frame: FrameType | None) -> bool:
    """Whether torch is about to be imported. Its C++ code takes no exception there: it drops some, and aborts the process at
    others (`torch/distributed/__init__.py` calls `torch._C._c10d_init`). The wish comes again."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and str(frame.f_globals.get("__name__")).partition(".")[0] == "torch":
            return True
        frame = frame.f_back
    return False


@contextmanager
def stoppable(once: bool, for_good: bool = False) -> Iterator[Stop]:
    """SIGTERM (a container or a scheduler stops us) and SIGHUP (the terminal is closed) end the block as Ctrl-C does: by a
    KeyboardInterrupt, with what it has begun cleared away. A signal that is ignored (nohup) or handled already is left alone.
    for_good: after the block the process ends, and no signal is to change how."""
    stop = Stop(once)
    mine = _STOPS if threading.current_thread() is threading.main_thread() else ()
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in mine if signal.getsignal(number) in usual}
    for number in before:
        signal.signal(number, stop.hear)
    try:
        yield stop
    finally:
        stop.over()
        for (
            number,
            handler,
        ) in before.items():  # an ending Python puts the default in the place of a handler, not of SIG_IGN
            signal.signal(number, signal.SIG_IGN if for_good else handler)
