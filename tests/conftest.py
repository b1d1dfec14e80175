"""Shared by all tests: the path guard, one thread (the test machine has two cores and two workers), and our deprecations."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """A deprecation said to a file of tests/helpers is an error, as one said to any other file of ours."""
    helpers = "|".join(file.stem for file in (_ROOT / "tests" / "helpers").glob("*.py"))
    for category in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}:({helpers})$")


@pytest.fixture
def hangup_is_heard() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, by every process that is started, too: what it does cannot be seen then."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
