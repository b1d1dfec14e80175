"""A wish to end that somebody drops is repeated; one that is being fulfilled is not."""

import ctypes
import signal
import time
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import ModuleType

import pytest

from mla2dsa import cli, stopping
from mla2dsa.stopping import Stop, stoppable

LONG = 5.0  # seconds: far above the quarter of one after which a wish comes again
TIMES = 6  # that a quarter of a second passes while something is cleared up


class Thing:
    """Something that a weak reference can point to."""


def dropped_by_a_bare_except(number: int) -> None:
    with suppress(BaseException):
        signal.raise_signal(number)


def dropped_by_a_weak_reference(number: int) -> None:
    thing = Thing()
    weakref.finalize(thing, signal.raise_signal, number)
    reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing
    assert reference() is None


def dropped_by_c(number: int) -> None:
    ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(number))()


DROPPED = [dropped_by_a_bare_except, dropped_by_a_weak_reference, dropped_by_c]
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
pytestmark = pytest.mark.usefixtures("hangup_is_heard")


def interrupted(work: Callable[[], object], once: bool = False) -> Stop:
    """`work` in a block that can be stopped, and is."""
    stops = []

    def run() -> None:
        with stoppable(once) as stop:
            stops.append(stop)
            work()

    with pytest.raises(KeyboardInterrupt):
        run()
    return stops[0]


def wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@pytest.mark.parametrize("drop", DROPPED, ids=lambda drop: drop.__name__)
def test_what_is_dropped_is_repeated(drop: Callable[[int], None], number: int):
    def work() -> None:
        drop(number)
        wait(LONG)
        pytest.fail("it was not repeated")

    assert interrupted(work).number == number


def test_what_is_dropped_again_and_again_is_repeated():
    dropped = []

    def work() -> None:
        dropped_by_a_bare_except(signal.SIGTERM)
        for number in range(3):
            with suppress(BaseException):
                wait(LONG)
                dropped.append(number)
        wait(LONG)

    interrupted(work)
    assert dropped == []


@pytest.mark.parametrize(("name", "to_its_end"), [("torch.part", True), ("torchvision", False)])
def test_torch_is_imported_to_its_end(name: str, to_its_end: bool):
    module = ModuleType(name)

    def work() -> None:
        exec("import signal\nsignal.raise_signal(signal.SIGTERM)\nwhole = True\n", module.__dict__)
        wait(LONG)

    interrupted(work)
    assert hasattr(module, "whole") is to_its_end


def by_finally(cleared: list[int]) -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        wait(0.25 * TIMES)
        cleared.append(1)


def by_a_generator(cleared: list[int]) -> None:
    @contextmanager
    def clearing() -> Iterator[None]:
        try:
            yield
        finally:
            wait(0.25 * TIMES)
            cleared.append(1)

    with clearing():
        signal.raise_signal(signal.SIGTERM)


def by_a_stack(cleared: list[int]) -> None:
    with ExitStack() as stack:
        stack.callback(cleared.append, 1)
        stack.callback(wait, 0.25 * TIMES)
        signal.raise_signal(signal.SIGTERM)


def by_another_error(cleared: list[int]) -> None:
    try:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise OSError("what came of it") from None
    except OSError:
        wait(0.25 * TIMES)
        cleared.append(1)
        raise KeyboardInterrupt from None


@pytest.mark.parametrize("clear", [by_finally, by_a_generator, by_a_stack, by_another_error])
def test_clearing_up_is_left_alone(clear: Callable[[list[int]], None]):
    cleared: list[int] = []
    interrupted(lambda: clear(cleared))
    assert cleared == [1]


@pytest.mark.parametrize(
    ("once", "at_once", "goes_on"),
    [
        pytest.param(False, 2.0, True, id="the-same-wish"),
        pytest.param(False, 0.0, False, id="a-later-one"),
        pytest.param(True, 0.0, True, id="torchrun-sends-twice"),
    ],
)
def test_a_second_signal_while_clearing_up(
    once: bool, at_once: float, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_AT_ONCE", at_once)
    cleared = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            cleared.append(1)

    assert interrupted(work, once).number == signal.SIGTERM
    assert bool(cleared) is goes_on


def test_where_the_process_ends_signals_do_nothing() -> None:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        with stoppable(once=False, for_good=True):
            pass
        for number in NUMBERS:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_when_it_is_over_nothing_is_raised_and_the_first_number_stands():
    with stoppable(once=False) as stop:
        dropped_by_a_bare_except(signal.SIGHUP)
        stop.over()
        signal.raise_signal(signal.SIGTERM)
        wait(0.25 * 3)
    assert stop.number == signal.SIGHUP


def test_nothing_came():
    with stoppable(once=False) as stop:
        wait(0.3)
    assert not stop.asked_for
    assert stop.number == signal.SIGINT


def test_handlers_of_others_are_left_alone_and_ours_are_taken_away():
    others = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before = [signal.getsignal(number) for number in NUMBERS]
        with stoppable(once=False):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert [signal.getsignal(number) for number in NUMBERS] == before
    finally:
        signal.signal(signal.SIGHUP, others)


@pytest.mark.parametrize("asked", [True, False], ids=["interrupted", "an-error"])
def test_a_command_says_what_ended_it(asked: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What C code makes of an exception that it has lost is told after the interruption that it comes of, and promises nothing."""

    def command(_: Namespace) -> int:
        if asked:
            dropped_by_a_bare_except(signal.SIGTERM)
        raise SystemError("error return without exception set")

    monkeypatch.setattr(cli, "run_command", command)
    assert cli.main(["env"]) == (143 if asked else 1)
    said = capsys.readouterr().err
    assert said.startswith("mla2dsa: interrupted; then internal error") is asked
    assert "error return without exception set" in said
    assert "half-written" not in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("when", ["told", "done"])
def test_a_signal_when_all_is_said_changes_nothing(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error's line is told, or the work is done: the exit code is that."""

    def signalled(*_: object, **__: object) -> int:
        signal.raise_signal(signal.SIGTERM)
        return 1 if when == "told" else 0

    if when == "told":
        monkeypatch.setattr(cli, "_fail", signalled)
        assert cli.main(["no-such-command"]) == 1
    else:
        monkeypatch.setattr(cli, "left_with", signalled)
        assert cli.main(["completion", "bash"]) == 0


def test_a_signal_between_two_lines_of_ours_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", lambda argv, stop: signal.raise_signal(signal.SIGTERM))
    assert cli.main(["env"]) == 143
    assert capsys.readouterr().err == "mla2dsa: interrupted; nothing was left half-written\n"
