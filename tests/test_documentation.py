"""What the documentation names exists: files, modules, commands with their options, make targets."""

import argparse
import ast
import re
from pathlib import Path

import pytest
from documents import calls_of, documents, files_named, modules_named
from places import ROOT

import mla2dsa as package
from mla2dsa import cli
from mla2dsa.exporters.dsa.names import RECIPE
from mla2dsa.exporters.dsa.targets import TARGETS as DSA_TARGETS

ROOMS = {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))

OTHERS = {
    "quick.yaml",
    "recipe.yaml",
    "convert_hf_to_gguf.py",
    "llama.cpp",
    *(name for target in DSA_TARGETS for name in files_named(target.source)),
    RECIPE,
}  # of other projects, and what lies with a result


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = parser._subparsers._group_actions if parser._subparsers else []
    return {name: sub for action in actions for name, sub in (action.choices or {}).items()}


def complaint(words: list[str]) -> str | None:
    """What the command line would not know of `mla2dsa WORDS`; placeholders and values are not looked at."""
    parser = cli._parser()
    while words and (below := subcommands(parser)):
        if not re.fullmatch(r"[a-z]+", words[0]):
            break  # `mla2dsa` itself with an option, or a placeholder
        if words[0] not in below:
            return f"no command {words[0]}"
        parser, words = below[words[0]], words[1:]
    options = {option for action in parser._actions for option in action.option_strings}
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in options]
    return f"no option {unknown[0]}" if unknown else None


def module_exists(name: str) -> bool:
    """A module or package of ours, a name that one of them defines or imports, or one of the Python front door."""
    if name.removeprefix("mla2dsa.") in package.__all__:
        return True
    parts, folder = name.removeprefix("mla2dsa.").split("."), ROOT
    while parts and (folder / parts[0]).is_dir():
        folder, parts = folder / parts[0], parts[1:]
    if not parts:
        return True
    file = folder / f"{parts[0]}.py"
    if not file.is_file():
        return False
    return (
        len(parts) == 1
        or re.search(rf"^(?:def|class) {parts[1]}\b|^{parts[1]}\b", file.read_text(), re.MULTILINE) is not None
    )


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("see `passes/tap.py`, [x](docs/recipe.md).", ["docs/recipe.md", "passes/tap.py"]),
        ("https://example.org/a.md and tests/test_*.py", []),
        ("`kernels/gpu/triton_code/`, 1.5, e.g. this", []),
        ("`make` reads pyproject.toml", ["pyproject.toml"]),
    ],
)
def test_files_are_read_from_text(text: str, files: list[str]) -> None:
    assert files_named(text) == files


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("`mla2dsa plan MODEL`", [["plan", "MODEL"]]),
        ("```\nmla2dsa build X \\\n  --sm 90  # a comment --like this\n```", [["build", "X", "--sm", "90"]]),
        ("    .venv/bin/mla2dsa env", [["env"]]),
        ("mla2dsa takes a checkpoint", []),
    ],
)
def test_calls_are_read_from_text(text: str, calls: list[list[str]]) -> None:
    assert list(calls_of("mla2dsa", text)) == calls


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("convert MODEL OUT --resume", None),
        ("kernels build --sm 80,90", None),
        ("--version", None),
        ("transmogrify X", "no command transmogrify"),
        ("kernels destroy", "no command destroy"),
        ("plan MODEL --faster", "no option --faster"),
    ],
)
def test_unknown_commands_are_seen(call: str, expected: str | None) -> None:
    assert complaint(call.split()) == expected


@pytest.mark.parametrize(
    ("name", "exists"),
    [
        ("mla2dsa.kernels.spec", True),
        ("mla2dsa.passes", True),
        ("kernels.gpu.binaries.pack.pack", True),
        ("mla2dsa.kernels.gpu.interpreter", False),
        ("kernels.spec.NoSuchName", False),
    ],
)
def test_modules_are_looked_up(name: str, exists: bool) -> None:
    assert module_exists(name) == exists


@pytest.mark.parametrize("document", documents(), ids=str)
def test_named_files_exist(document: Path) -> None:
    named = files_named((ROOT / document).read_text())
    named = [name for name in named if not {name, Path(name).name} & OTHERS]
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / document.parent / name).exists()]
    assert not missing, f"{document} names {missing}: write the path from the repository's root"


@pytest.mark.parametrize("document", documents(), ids=str)
def test_named_modules_exist(document: Path) -> None:
    missing = [name for name in modules_named((ROOT / document).read_text(), ROOMS) if not module_exists(name)]
    assert not missing, f"{document} names {missing}"


@pytest.mark.parametrize("document", documents(), ids=str)
def test_named_commands_exist(document: Path) -> None:
    found = {" ".join(words): complaint(words) for words in calls_of("mla2dsa", (ROOT / document).read_text())}
    assert not {call: fault for call, fault in found.items() if fault}


@pytest.mark.parametrize("document", documents(), ids=str)
def test_named_targets_exist(document: Path) -> None:
    calls = calls_of("make", (ROOT / document).read_text())
    targets = {word for words in calls for word in words if "=" not in word and not word.startswith(("'", '"'))}
    assert targets <= TARGETS


def test_rooms_of_the_architecture_are_those_in_the_tree() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = {
        name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([\w/]+)/`", row)
    }
    folders = (init.parent.relative_to(ROOT) for room in ROOMS for init in (ROOT / room).rglob("__init__.py"))
    expected = {str(folder) for folder in folders if not str(folder).startswith("kernels/gpu/")} - {"exporters"}
    assert expected <= table, f"no line for {sorted(expected - table)}"
    assert all((ROOT / room).is_dir() for room in table)


def test_contributing_gives_the_limits_of_the_tests() -> None:
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text())
    numbers = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"at most {numbers['MOST_FILES']} files" in text
    assert f"at most {numbers['MAX_LINES']} lines" in text
