"""`mla2dsa kernels build --jobs` that is stopped: its processes end with it, and nothing is left that the next run does not clear."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import of_session, survivors

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
WORKERS = 2


def compiled(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "kernels").glob("*.bin"))


def started(tmp_path: Path) -> subprocess.Popen[str]:
    """A build in a session of its own, whose workers are there."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "room").mkdir()
    environment = {
        **os.environ,
        "MLA2DSA_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": "",
    }
    command = ["kernels", "build", "--sm", "80", "--jobs", str(WORKERS), "--out", str(tmp_path / "room" / "pack")]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mla2dsa", *command], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    limit = time.monotonic() + 240
    while not compiled(tmp_path):  # a worker has finished a kernel
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "no kernel was compiled"
        time.sleep(0.01)
    assert len(list(of_session(process.pid))) > WORKERS
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_build(number: signal.Signals, tmp_path: Path) -> None:
    process = started(tmp_path)
    before = len(compiled(tmp_path))
    if number == signal.SIGINT:  # as a terminal sends Ctrl-C: to all
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=240)
    more = len(compiled(tmp_path)) - before
    assert more <= WORKERS, "kernels that were handed out were waited for"  # not those that were done at that instant
    assert "Traceback" not in said
    assert not survivors(process.pid, seconds=5)
    assert not (tmp_path / "room" / "pack").exists()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == "mla2dsa: interrupted; nothing was left half-written"
    assert not list((tmp_path / "room").iterdir())
