"""Engines that are kept: whole or not there, whoever else uses the cache, and nothing is left of killed runs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from mla2dsa.exporters.engine import cache
from mla2dsa.exporters.engine.cache import DAMAGED, DIGEST, ENGINE, HIT, LAYERS, MISS, find_engine, keep_engine
from mla2dsa.files.temporary import replace_file

KEY = "0123"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An entry of the cache, made from tmp_path/made."""
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "made"
    made.mkdir()
    (made / ENGINE).write_bytes(b"plan")
    (made / LAYERS).write_bytes(b"[]")
    keep_engine(KEY, made)
    return tmp_path / "cache" / "engines" / KEY


def found(tmp_path: Path, name: str = "out") -> tuple[str, dict[str, bytes]]:
    out = tmp_path / name
    out.mkdir()
    result = find_engine(KEY, out)
    return result, {file.name: file.read_bytes() for file in out.iterdir()}


def test_what_is_kept_is_found(kept: Path, tmp_path: Path) -> None:
    assert found(tmp_path) == (HIT, {ENGINE: b"plan", LAYERS: b"[]"})
    assert os.path.samefile(kept / ENGINE, tmp_path / "out" / ENGINE)
    assert not os.path.samefile(kept / LAYERS, tmp_path / "out" / LAYERS)
    assert [entry.name for entry in kept.parent.iterdir()] == [KEY]
    assert {file.name for file in kept.iterdir()} == {ENGINE, LAYERS, DIGEST}


def test_the_first_of_two_runs_is_kept(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / ENGINE).write_bytes(b"plan of the second")
    (tmp_path / "second" / LAYERS).write_bytes(b"[]")
    keep_engine(KEY, tmp_path / "second")
    assert (kept / ENGINE).read_bytes() == b"plan"
    assert [entry.name for entry in kept.parent.iterdir()] == [KEY]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "engine": lambda kept: replace_file(kept / ENGINE, b"plam"),
    "layers": lambda kept: (kept / LAYERS).write_bytes(b"[1]"),
    "no-layers": lambda kept: (kept / LAYERS).unlink(),
    "digest": lambda kept: (kept / DIGEST).write_text("{"),
    "digest-of-nothing": lambda kept: (kept / DIGEST).write_text("{}"),
    "digest-of-another-kind": lambda kept: (kept / DIGEST).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_damaged_goes(damage: Callable[[Path], object], kept: Path, tmp_path: Path) -> None:
    damage(kept)
    assert found(tmp_path) == (DAMAGED, {})
    assert not list(kept.parent.iterdir())
    keep_engine(KEY, tmp_path / "made")
    assert found(tmp_path, "again")[0] == HIT


def test_an_entry_that_is_taken_away_meanwhile(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache may be removed at any time."""
    import shutil

    def vanish(source: Path, target: Path, *, link: bool) -> str:
        shutil.rmtree(kept)
        raise FileNotFoundError(source)

    monkeypatch.setattr(cache, "place_file", vanish)
    assert found(tmp_path) == (DAMAGED, {})
    assert not list(kept.parent.iterdir())


def test_a_killed_run_leaves_nothing_that_the_next_does_not_clear(kept: Path, tmp_path: Path) -> None:
    half = kept.parent / ".mla2dsa-partial-01234567"
    (half / "in" / "engine").mkdir(parents=True)
    (half / "in" / "engine" / ENGINE).write_bytes(b"half")
    (half / "lock").touch()
    assert found(tmp_path)[0] == HIT
    assert [entry.name for entry in kept.parent.iterdir()] == [KEY]


RUN = """
    import sys
    from pathlib import Path
    from mla2dsa.exporters.engine.cache import ENGINE, LAYERS, find_engine, keep_engine
    room, letter = Path(sys.argv[1]), sys.argv[2]
    for number in range(40):
        out = room / f"{letter}-{number}"
        out.mkdir()
        if find_engine("0123", out) != "hit":
            (out / ENGINE).write_text(letter * 10000)
            (out / LAYERS).write_text(letter)
            keep_engine("0123", out)
        engine, layers = (out / ENGINE).read_text(), (out / LAYERS).read_text()
        assert engine == layers * 10000, "two runs were mixed"
        if number % 5 == 0 and (kept := Path(sys.argv[3]) / "engines" / "0123" / LAYERS).is_file():
            kept.unlink(missing_ok=True)  # damage
"""


def test_many_runs_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "MLA2DSA_CACHE": str(tmp_path / "cache")}
    (tmp_path / "room").mkdir()
    program = [sys.executable, "-P", "-c", textwrap.dedent(RUN), str(tmp_path / "room")]
    running = [
        subprocess.Popen(
            [*program, letter, str(tmp_path / "cache")], env=environment, stderr=subprocess.PIPE, text=True
        )
        for letter in "abcd"
    ]
    errors = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0, 0], errors
    assert {entry.name for entry in (tmp_path / "cache" / "engines").iterdir()} <= {"0123"}


def test_no_cache_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA2DSA_CACHE", str(tmp_path / "cache"))
    assert found(tmp_path) == (MISS, {})
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
