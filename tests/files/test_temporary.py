"""Private folders and files that appear whole: nothing is left of a killed run, and nobody takes away what another works in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from owned import tree

from mla2dsa.files.temporary import cache_entry, clear_abandoned, private_folder, replace_file, scratch_folder
from mla2dsa.files.writing import create, place_file, write_new

KILLED = """
    import os, signal, sys
    from pathlib import Path
    from mla2dsa.files.temporary import private_folder
    with private_folder(Path(sys.argv[1]), ".partial-") as folder:
        (folder / "half").write_text("x" * 1000)
        (folder / "inner").mkdir()
        (folder / "out").symlink_to(sys.argv[2])
        print("made", flush=True)
        signal.pause()
"""


def test_nothing_is_left(tmp_path: Path) -> None:
    with private_folder(tmp_path, ".partial-") as folder:
        assert folder.stat().st_dev == tmp_path.stat().st_dev
        assert folder.parent.stat().st_mode & 0o077 == 0
        (folder / "half").touch()
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), private_folder(tmp_path, ".partial-"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_next_run_clears_what_a_killed_one_has_left(tmp_path: Path) -> None:
    """And follows no link in it; what a living run works in stays, and so does what has another prefix."""
    room, precious = tmp_path / "room", tmp_path / "precious"
    room.mkdir()
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    (room / ".partial").mkdir()
    (room / "other").write_text("x")
    program = [sys.executable, "-P", "-c", textwrap.dedent(KILLED), str(room), str(precious)]
    processes = [subprocess.Popen(program, stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
    dead, alive = processes
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert len(list(room.glob(".partial-*"))) == 2
    clear_abandoned(room, ".partial-")
    (left,) = room.glob(".partial-*")
    assert (left / "in" / "half").is_file()
    alive.kill()
    alive.communicate()
    with private_folder(room, ".partial-"):
        assert not left.exists()
    assert {path.name for path in room.iterdir()} == {".partial", "other"}
    assert (precious / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("made", ["folder", "lock"])
def test_a_run_killed_at_its_first_step(made: str, tmp_path: Path) -> None:
    place = tmp_path / ".partial-01234567"
    place.mkdir()
    if made == "lock":
        (place / "lock").touch()
    with private_folder(tmp_path, ".partial-"):
        assert not place.exists()
    assert not list(tmp_path.iterdir())


def test_many_at_once(tmp_path: Path) -> None:
    """Runs that make, use and clear private folders in one place do not disturb each other."""
    script = """
        import sys
        from pathlib import Path
        from mla2dsa.files.temporary import replace_file
        for number in range(60):
            replace_file(Path(sys.argv[1], "entry"), sys.argv[2].encode() * 20000)
    """
    program = [sys.executable, "-P", "-c", textwrap.dedent(script), str(tmp_path)]
    running = [subprocess.Popen([*program, letter], stderr=subprocess.PIPE) for letter in "abcd"]
    errors = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0, 0], errors
    content = (tmp_path / "entry").read_text()
    assert (len(content), len(set(content))) == (20000, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


WRITERS: dict[str, Callable[[Path], object]] = {
    "write_new": lambda file: write_new(file, "changed"),
    "create": lambda file: create(file).close(),
    "place_file-copy": lambda file: place_file(file.parent / "other.txt", file, link=False),
    "place_file-link": lambda file: place_file(file.parent / "other.safetensors", file, link=True),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("kind", ["file", "hard-link", "link", "link-to-nowhere", "folder", "pipe"])
def test_what_is_there_is_never_written_to(write: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    for name in ("precious", "other.txt", "other.safetensors"):
        (tmp_path / name).write_text(name)
    make: dict[str, Callable[[Path], object]] = {
        "file": Path.touch,
        "hard-link": lambda file: os.link(tmp_path / "precious", file),
        "link": lambda file: file.symlink_to("precious"),
        "link-to-nowhere": lambda file: file.symlink_to("nowhere"),
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
    }
    make[kind](tmp_path / "new.safetensors")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError):
        write(tmp_path / "new.safetensors")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["hard-link", "link"])
def test_a_cache_entry_is_replaced_by_name_alone(kind: str, tmp_path: Path) -> None:
    """Somebody has linked a file of his into the cache: it loses that name, and nothing else."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "cache").mkdir()
    entry = tmp_path / "cache" / "entry"
    os.link(tmp_path / "precious", entry) if kind == "hard-link" else entry.symlink_to(tmp_path / "precious")
    replace_file(entry, b"new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (entry.read_bytes(), entry.is_symlink()) == (b"new", False)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["entry"]


@pytest.mark.parametrize(
    ("name", "placed"),
    [
        ("model-00001-of-00002.safetensors", "hardlink"), ("model.data", "hardlink"), ("model.engine", "hardlink"),
        ("config.json", "copy"), ("tokenizer.json", "copy"), ("tokenizer.model", "copy"), ("merges.txt", "copy"),
        ("chat_template.jinja", "copy"), ("layers.json", "copy"), ("README.md", "copy"), ("model.safetensors.index.json", "copy"),
    ],
)  # fmt: skip
def test_only_weights_are_linked(name: str, placed: str, tmp_path: Path) -> None:
    """Whoever edits a config in place edits one folder's."""
    (tmp_path / name).write_text("{}")
    method = place_file(tmp_path / name, tmp_path / "out" / name, link=True)
    assert method == placed or (placed == "copy" and method == "reflink")
    assert os.path.samefile(tmp_path / name, tmp_path / "out" / name) == (placed == "hardlink")


def test_scratch_folders_are_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder("ptxas") as folder:
        assert folder.parent.name.startswith(f"mla2dsa-{os.getuid()}-ptxas-")
        assert folder.parent.parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_cache_is_made(tmp_path: Path) -> None:
    with cache_entry(tmp_path / "a" / "cache") as folder:
        (folder / "x").touch()
    assert not list((tmp_path / "a" / "cache").iterdir())
