"""docs/tutorial.md is run from top to bottom, in a folder where a clone's examples are, and says what it prints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Done, captured_once, mla2dsa
from places import ROOT

__all__ = ["captured_once"]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
(SETTINGS,) = (text for kind, text in BLOCKS if kind == "yaml")
STEPS = [(text, BLOCKS[n + 1][1]) for n, (kind, text) in enumerate(BLOCKS) if kind == "sh"]


def loose(line: str) -> str:
    """A pattern of a line whose numbers may be others."""
    number = r"\d[\d.]*(?:e-\d+)?"
    return re.sub(number, lambda _: number, re.escape(line).replace(r"\.", ".").replace(r"\-", "-"))


def run(command: str) -> Done:
    """mla2dsa in this process, what else there is in a shell."""
    words = shlex.split(command, comments=True)
    if words[0] == "mla2dsa":
        return mla2dsa(*words[1:])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env={**os.environ, "PATH": path})
    return Done(done.returncode, done.stdout, done.stderr)


def test_every_step_is_followed_by_what_it_prints() -> None:
    assert len(STEPS) == sum(kind == "text" for kind, _ in BLOCKS) > 8
    assert "quick.yaml" in PAGE.split("```yaml")[0]


@pytest.mark.usefixtures("captured_once")
def test_the_page_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "quick.yaml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    for commands, told in STEPS:
        printed = ""
        for command in commands.splitlines():
            done = run(command)
            printed += done.out + done.err
            assert done.code == int("# exit code 1" in command), f"{command}\n{printed}"
        missing = [line for line in told.splitlines() if not re.search(loose(line), printed)]
        assert not missing, f"{commands}{printed}"


@pytest.mark.parametrize(
    ("printed", "is_found"),
    [
        ("loss 0.31, KL 2e-07 nats", True),
        ("loss 12, KL 0.1 nats", True),
        ("loss x, KL 0.1 nats", False),
        ("loss 1, KL 0.1", False),
    ],
)
def test_only_numbers_may_be_others(printed: str, is_found: bool) -> None:
    assert bool(re.search(loose("loss 1.5, KL 0.0123 nats"), printed)) is is_found
