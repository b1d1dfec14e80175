"""Folders that appear whole or not at all: full disks, Ctrl-C, kill -9, links that cannot be made."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import INDEXER, Interrupting, assert_one_line, contents, dense_checkpoint, random_indexers
from places import HELPERS

from mla2dsa.errors import UsageError, UserError
from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.exporters.dsa.strip import strip
from mla2dsa.files import system_calls, writing
from mla2dsa.files.staging import staged_folder
from mla2dsa.files.writing import place_file


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_checkpoint("sharded", tmp_path_factory)


def convert(source: Path, out: Path, weights: Any = None, overwrite: bool = False) -> Path:
    weights = weights or random_indexers(source)
    return write_dsa_checkpoint(source, out, weights, INDEXER, manifest={}, overwrite=overwrite)


def throw(error: BaseException) -> Callable[..., Any]:
    def action(*_: object, **__: object) -> None:
        raise error

    return action


# Interrupted


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
def test_ctrl_c_leaves_nothing(source: Path, tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "dsa"
    if existing:
        convert(source, out)
    before = contents(tmp_path)
    weights = Interrupting(random_indexers(source, seed=9), throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, weights, overwrite=existing)
    assert contents(tmp_path) == before
    assert out.exists() == existing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "write"])
def test_full_disk_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    full = OSError(code, os.strerror(code))
    weights: Any = random_indexers(source)
    if call == "fsync":  # where a file system that allocates late reports it
        monkeypatch.setattr(os, "fsync", throw(full))
    else:
        weights = Interrupting(weights, throw(full))
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "dsa", weights)
    assert_one_line(error, tmp_path / "dsa", "no space left")
    assert list(tmp_path.iterdir()) == []


def in_tmpfs(size: str, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python with `./small` a file system of its own of that size; skip where that takes rights we lack."""
    mount = f'mkdir -p small && mount -t tmpfs -o size={size} none small && exec "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    cwd = Path(str(arguments[0]))
    try:
        subprocess.run([*unshare, "true"], cwd=cwd, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a mount of its own (unshare and user namespaces)")
    program = [sys.executable, "-P", "-c", textwrap.dedent(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(HELPERS)}
    return subprocess.run([*unshare, *program], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


SMALL_DISK = """
    import sys
    from pathlib import Path
    from checkpoints import INDEXER, random_indexers
    from mla2dsa.errors import UserError
    from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
    source, out = Path(sys.argv[2]), Path("small/dsa")
    try:
        write_dsa_checkpoint(source, out, random_indexers(source), INDEXER, manifest={})
    except UserError as error:
        print(error)
    print(sorted(path.name for path in Path("small").iterdir()))
    if out.exists():
        from mla2dsa.files.json_files import read_json
        print({entry["placed"] for entry in read_json(out / "mla2dsa.json")["source"]["files"]})
"""


@pytest.mark.parametrize(
    ("size", "expected"),
    [("150k", ["no space left on the disk", "[]"]), ("8m", ["['dsa']", "{'copy'}"])],
    ids=["full", "copied"],
)
def test_on_another_disk(source: Path, tmp_path: Path, size: str, expected: list[str]) -> None:
    """A real other file system: shards are copied, or the disk is full and nothing stays."""
    result = in_tmpfs(size, SMALL_DISK, tmp_path, source)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all(part in line for part, line in zip(expected, lines, strict=True))


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from checkpoints import INDEXER, Interrupting, random_indexers
    from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    weights = Interrupting(random_indexers(source), lambda: os.kill(os.getpid(), signal.SIGKILL))
    write_dsa_checkpoint(source, out, weights, INDEXER, manifest={}, overwrite=True)
"""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
def test_kill_leaves_a_partial_that_the_next_run_clears(source: Path, tmp_path: Path, existing: bool) -> None:
    before, out = contents(source), tmp_path / "dsa"
    old = contents(convert(source, out)) if existing else {}
    environment = {**os.environ, "PYTHONPATH": str(HELPERS)}
    program = [sys.executable, "-P", "-c", textwrap.dedent(KILLED), str(source), str(out)]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = {entry.name for entry in tmp_path.iterdir() if entry != out}
    (partial,) = tmp_path.glob(".dsa.mla2dsa-work-*")
    assert left == {".dsa.mla2dsa-lock", partial.name}
    assert not list(partial.rglob("config.json"))
    assert (contents(out) if existing else {}) == old
    convert(source, out, overwrite=existing)
    assert [entry.name for entry in tmp_path.iterdir()] == ["dsa"]
    assert contents(source) == before


# Overwriting


def test_overwrite_replaces_everything(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "dsa")
    first = contents(out)
    convert(source, out, random_indexers(source, seed=5), overwrite=True)
    second = contents(out)
    assert set(first) == set(second)
    assert {name for name in second if first[name] != second[name]} == {"model-indexer.safetensors"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["dsa"]


@pytest.fixture(params=["exchange", "two-steps"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With what Linux has for folders, and as on a system without."""
    if request.param == "two-steps":
        monkeypatch.setattr(system_calls, "_renameat2", lambda *_: False)
    return str(request.param)


def test_failing_replacement_puts_the_old_folder_back(
    source: Path, tmp_path: Path, renames: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = convert(source, tmp_path / "dsa")
    before, rename = contents(out), os.rename

    def refuse(old: Path, new: Path, *_: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(new))

    def refuse_second(old: Path, new: Path) -> None:
        if old.name == "in":
            refuse(old, new)
        rename(old, new)

    if renames == "exchange":
        monkeypatch.setattr(system_calls, "_renameat2", refuse)
    else:
        monkeypatch.setattr(os, "rename", refuse_second)
    with pytest.raises(UserError) as error:
        convert(source, out, random_indexers(source, seed=5), overwrite=True)
    assert_one_line(error, out, "Permission denied")
    assert contents(out) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["dsa"]


def killed_work_folder(out: Path) -> Path:
    """As a killed run leaves it: unfinished, and nobody holds its lock."""
    folder = out.parent / f".{out.name}.mla2dsa-work-0123abcd"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "half").write_text("a shard")
    (folder / "lock").write_text("")
    return folder


def test_kill_between_the_renames_is_mended(source: Path, tmp_path: Path) -> None:
    """The old folder stands aside and nothing is in its place: the next run brings it back before anything else."""
    out = convert(source, tmp_path / "dsa")
    before = contents(out)
    os.rename(out, killed_work_folder(out) / "old")
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, Interrupting(random_indexers(source), throw(KeyboardInterrupt())), overwrite=True)
    assert contents(out) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["dsa"]


@pytest.mark.parametrize("make", [convert, strip], ids=["convert", "strip"])
def test_targets_that_are_refused(make: Callable[..., Path], source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "outer" / "source"))
    if make is strip:
        folder = convert(source, tmp_path / "outer" / "dsa")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    before = contents(tmp_path)
    for out, overwrite, part in [
        (folder, True, "same folder"),
        (tmp_path / "link", True, "same folder"),
        (folder / "dsa", False, "inside one another"),
        (tmp_path / "link" / "x", False, "inside one another"),
        (tmp_path / "outer", True, "inside one another"),
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "photos", False, "not empty"),
        (tmp_path / "photos", True, "holds no manifest of mla2dsa"),
    ]:
        with pytest.raises(UsageError) as error:
            make(folder, out, overwrite=overwrite)
        assert_one_line(error, out.resolve(), part)
    assert contents(tmp_path) == before


def test_empty_folder_and_missing_parents_are_fine(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    convert(source, tmp_path / "a" / "b" / "dsa")
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b" / "dsa")


# Placing one file


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(os, "link", throw(OSError(code, os.strerror(code))))
    method = place_file(tmp_path / "a.safetensors", tmp_path / "b", link=True)
    assert method in ("reflink", "copy")  # by what the file system under the test can do
    assert (tmp_path / "b").read_bytes() == b"weights"
    assert not os.path.samefile(tmp_path / "a.safetensors", tmp_path / "b")


def test_reflink_comes_before_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    (tmp_path / "a.safetensors").write_bytes(b"weights")
    calls = []

    def clone(target: int, request: int, origin: int) -> None:
        calls.append(request)
        os.write(target, os.pread(origin, 100, 0))

    monkeypatch.setattr(os, "link", throw(OSError(errno.EXDEV, "")))
    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert place_file(tmp_path / "a.safetensors", tmp_path / "b", link=True) == "reflink"
    assert calls == [writing._FICLONE]
    assert (tmp_path / "b").read_bytes() == b"weights"


def test_other_link_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").touch()
    monkeypatch.setattr(os, "link", throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        place_file(tmp_path / "a.safetensors", tmp_path / "b", link=True)


def test_other_errors_pass_through(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()

    def fail() -> None:
        with staged_folder(tmp_path / "out", [tmp_path / "source"]) as folder:
            (folder / "x").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
