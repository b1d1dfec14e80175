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
    while not list((tmp_path / "cache" / "kernels").glob("*.bin")):  # a worker has finished a kernel
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "no kernel was compiled"
        time.sleep(0.01)
    assert len(list(of_session(process.pid))) > WORKERS
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_build(number: signal.Signals, tmp_path: Path) -> None:
    process = started(tmp_path)
    if number == signal.SIGINT:  # as a terminal sends Ctrl-C: to all
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    sent = time.monotonic()
    _, said = process.communicate(timeout=240)
    assert time.monotonic() - sent < 20, "kernels that were begun were waited for"  # one takes 5 to 60 s
    assert "Traceback" not in said
    assert not survivors(process.pid, seconds=5)
    assert not (tmp_path / "room" / "pack").exists()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        return
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == "mla2dsa: interrupted; nothing was left half-written"
    assert not list((tmp_path / "room").iterdir())
