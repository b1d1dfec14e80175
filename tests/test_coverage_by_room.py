"""The table of lines that tests ran: rooms below their floor fail, with the files that miss most."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from coverage_by_room import FLOORS, Lines, by_room, complaints, main, read_lines, table
from places import HELPERS, ROOT

GOOD = {f"{room}/a.py": Lines(100, 8) for room in FLOORS} | {"kernels/gpu/b.py": Lines(50, 50)}


def written(folder: Path, files: dict[str, Lines]) -> Path:
    """As SlipCover writes it."""
    entries = {
        name: {"executed_lines": list(range(it.all - it.missed)), "missing_lines": list(range(it.missed))}
        for name, it in files.items()
    }
    file = folder / "lines.json"
    file.write_text(json.dumps({"meta": {}, "files": entries}))
    return file


def run(file: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["coverage_by_room.py", str(file)])
    return main()


def test_files_add_up_to_rooms() -> None:
    files = {"passes/a.py": Lines(10, 1), "passes/graph/b.py": Lines(30, 2), "files/c.py": Lines(5, 0)}
    assert by_room(files) == {"files": Lines(5, 0), "passes": Lines(40, 3)}
    assert (Lines(40, 3).percent, Lines(0, 0).percent) == (92.5, 100.0)


def test_rooms_at_their_floor_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(written(tmp_path, GOOD), monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == table(GOOD)
    assert out.splitlines()[0].split() == ["room", "lines", "missed", "covered", "at", "least"]
    assert "passes           100       8   92.0 %      92 %" in out
    assert "kernels           50      50    0.0 %\n" in out  # has no floor
    assert "all              450      82   81.8 %\n" in out


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_below_its_floor_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: str
) -> None:
    files = {**GOOD, f"{room}/worse.py": Lines(10, 4), f"{room}/full.py": Lines(1, 0)}
    assert run(written(tmp_path, files), monkeypatch) == 1
    assert capsys.readouterr().err == (
        f"{room}: 89.2 % of its lines are run by tests, expected 92 %; missed: {room}/a.py 8, {room}/worse.py 4\n"
    )
    assert len(complaints(files)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not what SlipCover writes"),
        ("", "not what SlipCover writes"),
        ("[]", "not what SlipCover writes"),
        ('{"files": {"passes/a.py": {}}}', "not what SlipCover writes"),
        ('{"files": {}}', "no line of exporters, files, optimizer, passes was measured"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    file = tmp_path / "lines.json"
    if text is not None:
        file.write_text(text)
    assert run(file, monkeypatch) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{file}: {message}" in err


def test_lines_of_a_real_run_are_measured(tmp_path: Path) -> None:
    """SlipCover around pytest, as `make test` calls it: what was imported is counted, and what never was."""
    out = tmp_path / "lines.json"
    # Of its own: under `make test` it would take itself for a worker of that run, whose lines it would then clear away.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLIPCOVER_", "PYTEST_"))}
    command = [
        sys.executable, "-P", "-m", "slipcover", "--source", ",".join(sorted(FLOORS)), "--json", "--out", str(out),
        "-m", "pytest", "-q", "-n", "1",
    ]  # fmt: skip

    def measured(test: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, test], cwd=ROOT, env=own, capture_output=True, text=True, check=False)

    done = measured("tests/passes/matching/test_sites.py")
    assert done.returncode == 0, done.stdout[-2000:]
    lines = read_lines(out)
    sites, never = lines["passes/matching/sites.py"], lines["optimizer/convert.py"]
    assert 0 <= sites.missed < sites.all / 4
    assert never.missed == never.all > 100
    (tmp_path / "test_fails.py").write_text("def test_fails():\n    raise ValueError\n")
    assert measured(str(tmp_path / "test_fails.py")).returncode == pytest.ExitCode.TESTS_FAILED


def test_make_measures_every_room_of_the_package() -> None:
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("ROOMS :=")]
    rooms = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert set(line.removeprefix("ROOMS :=").strip().split(",")) == rooms
    assert (HELPERS / "coverage_by_room.py").exists()
