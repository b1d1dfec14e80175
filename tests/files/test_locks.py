"""One run at a time on one OUT, whoever and wherever the others are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from owned import in_namespace, publish, tree

from mla2dsa.errors import UserError
from mla2dsa.files.locks import Held, abandoned, locked
from mla2dsa.files.staging import claim

HOLDER = """
    import sys, time
    from pathlib import Path
    from mla2dsa.files.staging import claim
    with claim(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(120)
"""
Hold = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Another process that claims a folder, and has it when this returns."""
    started = []

    def start(out: Path) -> subprocess.Popen[str]:
        program = [sys.executable, "-P", "-c", textwrap.dedent(HOLDER), str(out), "convert", "a model"]
        process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def spellings(room: Path) -> dict[str, Path]:
    (room / "link").symlink_to(room)
    (room / "away").mkdir()
    (room / "alias").symlink_to("out")
    return {
        "the-same": room / "out",
        "by-dots": room / "away" / ".." / "out",
        "by-a-linked-parent": room / "link" / "out",
        "by-a-link-to-nowhere": room / "alias",
        "relative": Path(os.path.relpath(room / "out")),
    }


@pytest.mark.parametrize("spelling", ["the-same", "by-dots", "by-a-linked-parent", "by-a-link-to-nowhere", "relative"])
def test_the_second_run_is_told_who_is_there(spelling: str, hold: Hold, tmp_path: Path) -> None:
    out = spellings(tmp_path)[spelling]
    process = hold(tmp_path / "out")
    before = tree(tmp_path)
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        publish(out, meanwhile=lambda: pytest.fail("work was begun"))
    assert time.monotonic() - started < 1
    assert error.value.exit_code == 1
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'out'}: in use by -c")
    for part in ("convert 'a model'", f"process {process.pid}", os.uname().nodename, "since 20", "wait for it"):
        assert part in said
    assert tree(tmp_path) == before
    process.kill()
    process.wait()
    publish(out)
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert not list(tmp_path.glob(".*"))


def test_other_outputs_are_free(hold: Hold, tmp_path: Path) -> None:
    hold(tmp_path / "out")
    publish(tmp_path / "out2")
    publish(tmp_path / "out.2")
    publish(tmp_path / "other" / "out")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_frees_its_lock_at_once(number: signal.Signals, hold: Hold, tmp_path: Path) -> None:
    process = hold(tmp_path / "out")
    process.send_signal(number)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".out.mla2dsa-lock"]
    publish(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_thread_is_another_run(tmp_path: Path) -> None:
    found: list[Exception | None] = []

    def second() -> None:
        try:
            publish(tmp_path / "out")
        except UserError as error:
            found.append(error)

    with claim(tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(found) == 1
    assert f"process {os.getpid()}" in str(found[0])


NAMESPACE = """
    import os, sys
    from pathlib import Path
    from owned import publish
    from mla2dsa.errors import UserError
    print(os.getpid())
    try:
        publish(Path(sys.argv[1]))
    except UserError as error:
        print(error)
"""


def test_runs_in_two_containers(hold: Hold, tmp_path: Path) -> None:
    """Where process ids of one mean nothing in the other."""
    process = hold(tmp_path / "out")
    pid, said = in_namespace(["--pid", "--fork"], [":"], NAMESPACE, tmp_path, tmp_path / "out").splitlines()
    assert int(pid) < 10
    assert f"in use by -c {tmp_path}/out" in said
    assert f"process {process.pid} on" in said


COUNT = """
    import os, sys, time
    from pathlib import Path
    from mla2dsa.files.locks import Held, locked
    lock, shared, crash = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    done = 0
    while done < 60:
        try:
            with locked(lock):
                assert not shared.exists(), "two at once"
                shared.write_text("")
                os.sched_yield()
                shared.unlink()
                done += 1
                if done == crash:
                    os._exit(9)
        except Held:
            time.sleep(0.0005)
"""


def test_never_two_at_once(tmp_path: Path) -> None:
    """Four processes take and drop the lock as fast as they can, and one of them dies with it."""
    program = [sys.executable, "-P", "-c", textwrap.dedent(COUNT), str(tmp_path / "lock"), str(tmp_path / "shared")]
    running = [subprocess.Popen([*program, str(crash)], stderr=subprocess.PIPE, text=True) for crash in (0, 0, 0, 30)]
    errors = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0, 9], errors
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}
    with locked(tmp_path / "lock"):
        pass
    assert not list(tmp_path.iterdir())


# What has the lock's name


@pytest.mark.parametrize("kind", ["link", "hard-link", "file", "folder", "pipe"])
def test_what_is_in_the_place_of_the_lock_is_left_alone(kind: str, tmp_path: Path) -> None:
    precious, lock = tmp_path / "precious", tmp_path / ".out.mla2dsa-lock"
    precious.write_text("mine")
    match kind:
        case "link":
            lock.symlink_to(precious)
        case "hard-link":
            os.link(precious, lock)
        case "file":
            lock.write_text("mine, too")
        case "folder":
            lock.mkdir()
        case "pipe":
            os.mkfifo(lock)
    before = tree(tmp_path)
    with pytest.raises(UserError) as error:
        publish(tmp_path / "out")
    assert str(lock) in str(error.value)
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_abandoned(hold: Hold, tmp_path: Path) -> None:
    lock = tmp_path / ".out.mla2dsa-lock"
    assert not abandoned(lock)
    process = hold(tmp_path / "out")
    assert not abandoned(lock)
    with pytest.raises(Held), locked(lock):
        pass
    process.kill()
    process.wait()
    assert abandoned(lock)


def test_an_unreadable_holder_is_named_all_the_same(tmp_path: Path) -> None:
    """At the very moment when the lock is made, its file is empty."""
    import fcntl

    with (tmp_path / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(Held) as held, locked(tmp_path / "lock"):
            pass
    assert str(held.value) == "another mla2dsa"
