"""Renames that replace nothing, exchanges at one instant, and processes that do not outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from owned import tree

from mla2dsa.files import system_calls
from mla2dsa.files.system_calls import exchange_folders, move_folder

THERE: dict[str, Callable[[Path], object]] = {
    "empty": Path.mkdir,
    "full": lambda path: (path.mkdir(), (path / "thesis.txt").write_text("mine")),
    "file": lambda path: path.write_text("mine"),
    "link": lambda path: path.symlink_to("old"),
    "link-to-nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("system", ["linux", "another"])
@pytest.mark.parametrize("make", THERE.values(), ids=THERE.keys())
def test_nothing_is_replaced(
    make: Callable[[Path], object], system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system == "another":
        monkeypatch.setattr(system_calls, "_renameat2", lambda *_: False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x").touch()
    make(tmp_path / "new")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError):
        move_folder(tmp_path / "old", tmp_path / "new")
    assert tree(tmp_path) == before
    move_folder(tmp_path / "old", tmp_path / "free")
    assert (tmp_path / "free" / "x").exists()
    with pytest.raises(FileNotFoundError):
        move_folder(tmp_path / "old", tmp_path / "free2")


def test_what_comes_between_the_look_and_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a system without the flag: POSIX itself renames no folder onto a file or a full folder."""
    monkeypatch.setattr(system_calls, "_renameat2", lambda *_: False)
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    (tmp_path / "old").mkdir()
    for name in ("full", "file", "link"):
        THERE[name](tmp_path / name)
        with pytest.raises(FileExistsError):
            move_folder(tmp_path / "old", tmp_path / name)


def test_exchange(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange_folders(tmp_path / "a", tmp_path / "b") == (sys.platform == "linux")
    if sys.platform == "linux":
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    with pytest.raises(FileNotFoundError):
        exchange_folders(tmp_path / "a", tmp_path / "c")


CHILD = """
    import os, sys, time
    from mla2dsa.files.system_calls import die_with_parent
    time.sleep(float(sys.argv[2]))
    die_with_parent(int(sys.argv[1]))
    print("up", flush=True)
    time.sleep(60)
"""
PARENT = """
    import os, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-P", "-c", sys.argv[1], str(os.getpid()), sys.argv[2]])
    print(child.pid, flush=True)
    if sys.argv[3] == "leaves":
        sys.exit()
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has the call")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, "leaves", "gone-before-it-asks"])
def test_a_child_dies_with_its_parent(how: object) -> None:
    late = how == "gone-before-it-asks"
    arguments = [textwrap.dedent(CHILD), "1" if late else "0", "leaves" if late else str(how)]
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(PARENT), *arguments], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if isinstance(how, signal.Signals):
        assert parent.stdout.readline() == "up\n"
        assert alive(child)
        parent.send_signal(how)
    parent.wait()
    limit = time.monotonic() + 20
    while alive(child):
        assert time.monotonic() < limit, "it lives on"
        time.sleep(0.01)
