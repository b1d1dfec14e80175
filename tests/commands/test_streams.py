"""What surrounds a run: closed streams, no home folder, another locale, names that are no text. One line or success, each time."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Done, assert_refused, mla2dsa
from places import TINY

from mla2dsa.cli import main


def shell(script: str, tmp_path: Path, **environment: str | None) -> Done:
    """Run `script`, in which "$@" is mla2dsa, in `tmp_path`. environment: None removes a variable."""
    known = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment}
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-P", "-m", "mla2dsa"], cwd=tmp_path, capture_output=True,
        env={name: value for name, value in known.items() if value is not None}, timeout=600, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def assert_one_line(done: Done, code: int, *parts: str) -> None:
    lines = done.err.splitlines()
    assert (len(lines), done.code) == (1, code), done.err
    assert lines[0].startswith(("mla2dsa: ", '{"error": '))  # with --json an error is an object
    assert "internal error" not in lines[0]
    assert all(part in lines[0] for part in parts), lines[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, folder / name)
    return folder


@pytest.mark.parametrize(
    "command",
    ["inspect model", "env --json", "--version", "strip model out"],
    ids=lambda text: text.replace(" ", "_"),
)
def test_closed_stdout(command: str, tmp_path: Path, model: Path) -> None:
    """Refused before anything is done: a file opened later would get stdout's number, and what is printed."""
    assert_one_line(shell(f'"$@" {command} >&-', tmp_path), 1, "stdout is closed")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_closed_stderr(tmp_path: Path, model: Path) -> None:
    done = shell('"$@" inspect model 2>&-; echo code $?', tmp_path)
    assert "attention: dense" in done.out
    assert done.out.endswith("code 0\n")
    done = shell('"$@" inspect nowhere/at/all 2>&-; echo code $?', tmp_path)
    assert done.out == "code 1\n"


def test_closed_stdin(tmp_path: Path, model: Path) -> None:
    assert shell('"$@" inspect model <&-', tmp_path).code == 0


def test_all_streams_closed(tmp_path: Path, model: Path) -> None:
    assert shell('"$@" inspect model <&- >&- 2>&-', tmp_path).code == 1


@pytest.mark.parametrize("stream", ["/dev/full", "/dev/full 2>/dev/full"], ids=["stdout", "both"])
def test_full_disk_behind_stdout(stream: str, tmp_path: Path, model: Path) -> None:
    done = shell(f'"$@" inspect model >{stream}', tmp_path)
    assert done.code == 1
    assert "Traceback" not in done.err


NO_SUCH_USER = """
import pwd, sys
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
from mla2dsa.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", [["env"], ["inspect", "model"]], ids=" ".join)
def test_no_home(command: list[str], tmp_path: Path, model: Path) -> None:
    """No HOME, and no such user whose home could be looked up, as in a container with --user."""
    dropped = ("HOME", "MLA2DSA_CACHE", "XDG_CACHE_HOME", "HF_HOME", "USER", "LOGNAME")
    known = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run(
        [sys.executable, "-P", "-c", NO_SUCH_USER, *command], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**known, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "~").exists()


def test_home_that_cannot_be_written(tmp_path: Path, model: Path) -> None:
    done = shell('"$@" inspect model', tmp_path, HOME="/proc/1", MLA2DSA_CACHE=None, XDG_CACHE_HOME=None)
    assert done.code == 0, done.err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
@pytest.mark.parametrize("name", ["modèle", "a\nb", "a b", "\udcff\udcfe", "\x1b[31m", "日本"], ids=ascii)
def test_names_in_any_locale(
    name: str, encoding: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown as far as the locale can; JSON is ASCII. A name in an error stays in one line that a terminal can show."""
    folder = model.rename(tmp_path / name)
    for command in (["inspect", str(folder)], ["inspect", str(folder), "--json"]):
        with printing(encoding, monkeypatch) as printed:
            assert main(command) == 0
        assert "dense" in printed[0]
        assert printed[1] == ""
    (folder / "config.json").unlink()
    with printing(encoding, monkeypatch) as printed:
        assert main(["inspect", str(folder)]) == 1
    assert printed[1].startswith("mla2dsa: ")
    assert printed[1].endswith("config.json: no such file; fetch the file again\n")
    assert printed[1][:-1].isprintable()


@contextlib.contextmanager
def printing(encoding: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Streams as Python opens them in a locale; [stdout, stderr] once the block is over."""
    found: list[str] = []
    raw = [io.BytesIO(), io.BytesIO()]
    with monkeypatch.context() as patch:
        for name, stream, errors in zip(("stdout", "stderr"), raw, ("strict", "backslashreplace"), strict=True):
            patch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, errors=errors))
        yield found
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        found += [stream.getvalue().decode(encoding) for stream in raw]


@pytest.mark.parametrize(
    "locale", [{"LANG": "C"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}], ids=str
)
def test_another_locale(locale: dict[str, str], tmp_path: Path, model: Path) -> None:
    model.rename(tmp_path / "modèle")
    done = shell('"$@" inspect ./mod*/', tmp_path, **locale)
    assert (done.code, done.err) == (0, "")
    assert "attention: dense" in done.out


def test_a_conversion_of_a_folder_that_is_no_text(tmp_path: Path, model: Path) -> None:
    """safetensors takes no such path: one line, and nothing stays behind."""
    folder = model.rename(tmp_path / "\udcffm")
    done = mla2dsa("convert", folder, tmp_path / "out", "--index-topk", 32, "--tokens", 1024, "--skip-verification")
    assert_refused(done, 1, "model.safetensors: safetensors does not read", "not valid UTF-8")
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}


def test_a_conversion_into_a_folder_that_is_no_text(tmp_path: Path, model: Path) -> None:
    """Its manifest is valid JSON all the same, and reads back."""
    out = tmp_path / "\udcfeout\n"
    flags = ("--index-topk", 32, "--tokens", 1024, "--skip-verification")
    assert mla2dsa("convert", model, out, *flags).code == 0
    assert mla2dsa("inspect", out, "--json").json()["made_by_mla2dsa"]["verified"] is False
    assert mla2dsa("strip", out, tmp_path / "back").code == 0
    assert (tmp_path / "back" / "config.json").read_bytes() == (model / "config.json").read_bytes()
