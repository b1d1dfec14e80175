"""Processes that compile: all that is asked for comes, what fails is told, and one that is killed is named."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

pytest.importorskip("triton")

from mla2dsa.errors import UserError
from mla2dsa.kernels.gpu.binaries.compile import compile_variant
from mla2dsa.kernels.gpu.binaries.pack import compile_all, variants_of
from mla2dsa.kernels.gpu.binaries.workers import Task, _sendable, compiled_by
from mla2dsa.kernels.gpu.programs.catalogue import catalogue


@pytest.fixture(autouse=True)
def session_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """Of the kernels that are compiled soonest: those that select."""
    found = [variant for variant in variants_of(catalogue(80)) if "topk" in variant.kernel]
    return [(variant, 80) for variant in found[:3]]


def test_all_come_and_are_what_one_process_makes(tasks: list[Task]) -> None:
    told: list[tuple[int, int]] = []
    made = dict(compile_all(tasks, 2, None, lambda done, total: told.append((done, total))))
    assert sorted(made, key=tasks.index) == tasks
    assert told == [(done, len(tasks)) for done in range(1, len(tasks) + 1)]
    assert made[tasks[0]].cubin == compile_variant(*tasks[0]).cubin
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("processes", [1, 2, 9])
def test_what_cannot_be_compiled_is_told_as_by_one(processes: int, tasks: list[Task]) -> None:
    unknown = replace(tasks[0][0], kernel="nobody_knows"), 80
    with pytest.raises(UserError, match="nobody_knows"):
        compile_variant(*unknown)
    with pytest.raises(UserError, match="nobody_knows"):
        list(compiled_by(processes, [unknown, *tasks[:1]]))
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_told_of(tasks: list[Task]) -> None:
    made = compiled_by(2, tasks)
    next(made)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(UserError, match=r"for sm_80: the process that compiled it ended with exit code -9; .*--jobs"):
        list(made)
    assert not multiprocessing.active_children()


def test_nobody_is_left_when_it_is_given_up(tasks: list[Task], tmp_path: Path) -> None:
    made = compiled_by(2, tasks)
    next(made)
    made.close()
    assert not multiprocessing.active_children()
    assert [file.suffix for file in (tmp_path / "cache" / "kernels").iterdir() if file.is_file()].count(".bin") >= 1


def masks(name: str) -> list[int]:
    """Signals that each child blocks, by the bits of /proc's mask."""
    found = [Path(f"/proc/{child.pid}/status").read_text() for child in multiprocessing.active_children()]
    return [int(line.split()[1], 16) for text in found for line in text.splitlines() if line.startswith(name)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_for_who_asks(number: signal.Signals, tasks: list[Task]) -> None:
    resource_tracker._resource_tracker._stop()  # as in a process that has started none yet
    made = compiled_by(2, tasks)
    next(made)
    blocked = masks("SigBlk:")
    made.close()
    assert len(blocked) == 2
    assert all(mask >> (number - 1) & 1 for mask in blocked)
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


class TwoPartsError(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


@pytest.mark.parametrize("error", [UserError("as it is"), TwoPartsError("x", "y"), ValueError(lambda: 1)])
def test_every_exception_can_be_sent(error: Exception) -> None:
    sent = pickle.loads(pickle.dumps(_sendable(error)))
    assert str(error) in str(sent)
    assert type(sent).__name__ == "UserError" or type(error).__name__ in str(sent)


@pytest.mark.parametrize("processes", [0, -1])
def test_there_is_always_one(processes: int, tasks: list[Task]) -> None:
    assert [task for task, _ in compiled_by(processes, tasks[:1])] == tasks[:1]
