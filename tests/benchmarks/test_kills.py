"""benchmarks/kills.py, a few kills of the two quickest commands: what it looks at holds, and it would see if it did not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from owned import publish
from places import ROOT

SCRIPT = ROOT / "benchmarks" / "kills.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_few_kills() -> None:
    command = [sys.executable, "-P", str(SCRIPT), "--kills", "2", "--only", "strip,convert", "--seed", "3"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, strip, convert = (line.split() for line in done.stdout.splitlines())
    assert (head[0], head[-1]) == ("command", "faults")
    assert (strip[:2], strip[-1]) == (["strip", "1"], "0")
    assert (convert[:2], convert[-1]) == (["convert", "1"], "0")


@pytest.fixture(scope="module")
def kills() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kills", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_what_is_left_is_seen(kills: ModuleType, tmp_path: Path) -> None:
    room = kills.Room(tmp_path)
    (tmp_path / "cache" / "kernels").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    room.clear()
    publish(room.out)
    assert kills.left_over(room) == []
    assert kills.stage(room, False, {}) == "published"
    for place in (
        room.out.parent / ".out.mla2dsa-lock",
        tmp_path / "cache" / ".mla2dsa-partial-1",
        tmp_path / "tmp" / "mla2dsa-0-x",
    ):
        place.mkdir()
        assert len(kills.left_over(room)) == 1
        place.rmdir()


def test_what_is_half_finished_is_seen(kills: ModuleType, tmp_path: Path) -> None:
    publish(tmp_path / "a")
    publish(tmp_path / "b")
    assert kills.contents(tmp_path / "a") == kills.contents(tmp_path / "b")
    (tmp_path / "b" / "inner" / "weights").write_text("ne")
    assert kills.contents(tmp_path / "a") != kills.contents(tmp_path / "b")


def test_seconds_are_no_difference(kills: ModuleType, tmp_path: Path) -> None:
    for name, seconds in (("a", 9.9), ("b", 10.1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(f'{{"seconds": {seconds}}}')
        (tmp_path / name / "mla2dsa.json").write_text(
            f'{{"report": {{"seconds": {seconds}}}, "files": [{{"name": "report.json", "size": {len(str(seconds))}}}]}}'
        )
    assert kills.contents(tmp_path / "a") == kills.contents(tmp_path / "b")
