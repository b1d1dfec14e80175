"""Files that are opened for reading only if they are regular ones."""

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mla2dsa.errors import UserError
from mla2dsa.files.regular import open_regular


class SignalAt:
    """A trace function that acts as a signal does at one of the places where Python looks for signals."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self, _frame: FrameType, _event: str, argument: Any) -> Any:
        del argument  # what is returned just now: the traceback would keep it
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self


def test_a_signal_at_any_step_of_opening_stays_one(tmp_path: Path) -> None:
    """It once became `cannot be read (Bad file descriptor)`, exit code 1: the descriptor was closed twice."""
    file = tmp_path / "config.json"
    file.write_text("{}")
    outcomes = []
    for step in range(1, 100):
        sys.settrace(SignalAt(step))
        try:
            with open_regular(file):
                outcome = "opened"
        except BaseException as error:
            outcome = type(error).__name__
        finally:
            sys.settrace(None)
        outcomes.append(outcome)
        if outcome == "opened":
            break
    assert outcomes == ["KeyboardInterrupt"] * (len(outcomes) - 1) + ["opened"]
    assert len(outcomes) > 8  # of open_regular's and _descriptor's steps


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        pytest.param("a folder", Path.mkdir, id="folder"),
        pytest.param("a FIFO", os.mkfifo, id="fifo"),
        pytest.param("a device", lambda path: path.symlink_to("/dev/null"), id="link-to-device"),
    ],
)
def test_what_is_no_regular_file_is_named_and_closed(tmp_path: Path, kind: str, make: Any) -> None:
    make(tmp_path / "config.json")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=f"config.json: {kind}, expected a regular file"):
        open_regular(tmp_path / "config.json")
    assert len(os.listdir("/proc/self/fd")) == before
