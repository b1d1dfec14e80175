"""What the command line does for whoever types: what was meant, which --help, JSON errors, quiet, log files, completion, speed."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TINY, assert_refused, mla2dsa, quick_capture, small_flags  # noqa: F401  (a fixture)

from mla2dsa import cli
from mla2dsa.commands.completion import parsers
from mla2dsa.commands.parser import near_to
from mla2dsa.optimizer import environment

pytestmark = pytest.mark.usefixtures("quick_capture")
ALL = dict(parsers(cli._parser()))
COMMANDS = [path.split() for path in ALL if path]


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        ("plna model", ["invalid choice: 'plna', did you mean plan?", "; see mla2dsa --help"]),
        ("kernels biuld", ["did you mean build?", "; see mla2dsa kernels --help"]),
        ("plan model --index-topkk 4", ["--index-topkk 4, did you mean --index-topk?", "; see mla2dsa plan --help"]),
        ("plan model --recpie=x", ["did you mean --recipe?", "; see mla2dsa plan --help"]),
        ("kernels list --jsn", ["did you mean --json?", "; see mla2dsa kernels list --help"]),
        ("plan model --layout onw", ["'onw', did you mean own?", "; see mla2dsa plan --help"]),
        ("convert model out --over", ["--over, did you mean --overwrite?", "; see mla2dsa convert --help"]),
        ("plan model extra", ["unrecognized arguments: extra; see mla2dsa plan --help"]),
        ("plan --frobnicate model", ["unrecognized arguments: --frobnicate; see mla2dsa plan --help"]),
        ("env -q -v", ["not allowed with", "; see mla2dsa env --help"]),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_usage_errors_say_what_was_meant_and_where_help_is(call: str, parts: list[str]) -> None:
    assert_refused(mla2dsa(*call.split()), 2, *parts)


@pytest.mark.parametrize(("word", "near"), [("fly", ""), ("--o", ""), ("inspekt", ", did you mean inspect?")])
def test_nothing_far_is_suggested(word: str, near: str) -> None:
    assert near_to(word, ["plan", "inspect", "--overwrite", "--out-of-reach"]) == near


@pytest.mark.parametrize(
    ("call", "code", "details"),
    [
        ("plan /nowhere --json", 1, 0), ("plna --json", 2, 0), ("plan tiny --json --index-topk 0", 2, 0),
        ("convert tiny out --index-topk 5000 --calibration /nowhere --json", 2, 2),
    ],
    ids=["path", "command", "value", "several"],
)  # fmt: skip
def test_errors_are_json_with_json(
    call: str, code: int, details: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(TINY)  # a path without spaces
    done = mla2dsa(*call.split())
    assert (done.code, done.out, len(done.raw_err.splitlines())) == (code, "", 1)
    said = json.loads(done.raw_err)
    assert (said["exit_code"], len(said["details"])) == (code, details)
    assert said["error"]
    assert not said["error"].startswith("mla2dsa:")


def test_quiet_says_nothing_and_a_log_file_has_all(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    log, flags = tmp_path / "log.txt", (*small_flags(tmp_path_factory), "--skip-verification")
    done = mla2dsa("convert", TINY, tmp_path / "dsa", *flags, "-q", "--log-file", log)
    assert (done.code, done.err) == (0, "")
    lines = log.read_text().splitlines()
    assert any(" DEBUG mla2dsa." in line for line in lines)
    assert any(" INFO mla2dsa." in line for line in lines)
    assert lines[0][:4].isdigit()  # the year
    assert_refused(mla2dsa("env", "--log-file", log), 2, f"--log-file {log}: is there already")
    assert_refused(mla2dsa("env", "--log-file", tmp_path / "no" / "x"), 2, "No such file")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_an_example(command: list[str]) -> None:
    parser = ALL["".join(f" {word}" for word in command)]
    example = (parser.epilog or "").partition("example")[2]
    assert f"mla2dsa {' '.join(command)}" in example
    assert isinstance(parser, argparse.ArgumentParser)
    assert not parser.allow_abbrev


def test_env_knows_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mla2dsa("env", "--json").json()
    assert set(found["commands"]) == {path.split()[0] for path in ALL if path}
    assert found["commands"]["plan"] == "usable"
    assert found["packages"]["onnxruntime"]  # whichever build it is
    lacking = {**dict.fromkeys(environment._PACKAGES, "1"), "tensorrt-rtx": None, "tensorrt": None, "uvicorn": None}
    said = environment._commands(lacking, ["a GPU"])
    assert said["build"] == (
        "with --backend tensorrt-rtx: not installed: tensorrt-rtx; with TensorRT: not installed: tensorrt"
    )
    assert (said["serve"], said["bench"]) == ("not installed: uvicorn", "usable in torch and onnxruntime")
    assert said["generate"] == "usable in torch and onnxruntime"
    assert environment._commands({**lacking, "tensorrt": "1"}, ["a GPU"])["build"] == "usable with TensorRT"
    assert environment._commands({**lacking, "torch": None}, [])["verify"] == "not installed: torch"


def completed(shell_words: str, tmp_path: Path) -> list[str]:
    """What bash offers for the last of the words."""
    script = tmp_path / "completion.bash"
    script.write_text(mla2dsa("completion", "bash").out)
    words = shell_words.split(" ")
    array = " ".join(f"'{word}'" for word in words)
    run = f'source {script}; COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _mla2dsa; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="has no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mla2dsa pl", ["plan"]),
        ("mla2dsa kernels b", ["build"]),
        ("mla2dsa plan model --index-h", ["--index-head-dim"]),
        ("mla2dsa kernels build --ov", ["--overwrite"]),
        ("mla2dsa convert a b --layout d", ["deepseek_v32"]),
        ("mla2dsa completion --l", ["--log-file"]),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_bash_completes(words: str, expected: list[str], tmp_path: Path) -> None:
    assert completed(words, tmp_path) == expected


def test_other_shells_have_every_command() -> None:
    fish, zsh = mla2dsa("completion", "fish").out, mla2dsa("completion", "zsh").out
    assert zsh.startswith("autoload -U +X bashcompinit")
    for path in filter(None, ALL):
        assert f" -a {path.split()[-1]} " in fish
        assert path in zsh


def seconds_of(*arguments: str, tmp_path: Path) -> tuple[int, float]:
    """Exit code and CPU seconds of a run of its own (wall time depends on the neighbours)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-P", "-m", "mla2dsa", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.returncode, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("call", "code", "limit"),
    [
        ("--help", 0, 0.25), ("plan --help", 0, 0.25), ("convert --help", 0, 0.25),
        ("plan model --wrong", 2, 1.0), ("plan /nowhere", 1, 1.0), ("convert /nowhere out", 1, 1.0), ("verify /a /b", 1, 1.0),
        ("generate /nowhere hello", 1, 1.0), ("strip /nowhere out", 1, 1.0), ("inspect /nowhere", 1, 1.0),
        ("bench /nowhere", 1, 1.0), ("export /nowhere out", 1, 1.0), ("build /nowhere out", 1, 1.0), ("deploy /nowhere out", 1, 1.0),
    ],
    ids=lambda value: value.replace(" ", "_").replace("/", "-") if isinstance(value, str) else "",
)  # fmt: skip
def test_answers_at_once(call: str, code: int, limit: float, tmp_path: Path) -> None:
    found, seconds = min((seconds_of(*call.split(), tmp_path=tmp_path) for _ in range(2)), key=lambda one: one[1])
    assert found == code
    assert seconds < limit


def test_no_color_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich paints a bar where a terminal can; with NO_COLOR it sends no colour."""
    from mla2dsa.commands.show.conversion import Progress

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Progress()._console.no_color
    monkeypatch.delenv("NO_COLOR")
    assert not Progress()._console.no_color


@pytest.mark.parametrize(
    "words",
    [
        ["convert", TINY, ""], ["plan", ""], ["verify", TINY, TINY, "--text", ""], ["plan", TINY, "--recipe", ""],
        ["plan", TINY, "--log-file="], ["serve", TINY, ""], ["compare", "", TINY],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_an_empty_path_is_not_the_folder_one_is_in(
    words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(mla2dsa(*words), 2, "expected a path, found none", "--help")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["calibration", "donor"])
def test_an_empty_path_in_a_recipe(setting: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f'{setting}: ""\n')
    assert_refused(
        mla2dsa("plan", TINY, "--recipe", tmp_path / "recipe.yaml"), 2, setting, "expected a path, found none"
    )
