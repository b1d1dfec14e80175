"""What the documentation names: files, modules, commands with their options, make targets."""

import re
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

SUFFIXES = r"(?:py|cpp|h|md|yml|yaml|toml)"
_FILE = re.compile(rf"(?<![\w/.<>{{}}*-])((?:[\w.-]+/)*[\w.-]+\.{SUFFIXES})(?![\w*/]|\.\w)")
_URL = re.compile(r"https?://\S+")
_MODULE = re.compile(r"(?<![\w./])((?:mla2dsa\.)?[a-z_]\w*(?:\.\w+)+)")


def documents() -> list[Path]:
    """Every .md of the repository, but the held-out text's, which names files of CPython."""
    hidden = (".git/", ".venv/", "demo-out/", "build/", "examples/tiny-mla/held_out/")
    files = (file.relative_to(ROOT) for file in ROOT.rglob("*.md"))
    return sorted(file for file in files if not str(file).startswith(hidden))


def files_named(text: str) -> list[str]:
    return sorted(set(_FILE.findall(_URL.sub("", text))))


def modules_named(text: str, rooms: set[str]) -> list[str]:
    """Dotted names that begin with the package or, in code, with one of its rooms."""
    found = {name for name in _MODULE.findall(code_of(text)) if not re.search(rf"\.(?:{SUFFIXES}|json)$", name)}
    return sorted(name for name in found if name.split(".")[0] in {"mla2dsa", *rooms})


def code_of(text: str) -> str:
    """What stands in fenced blocks, in indented blocks and between back ticks, a piece a line; continued lines joined."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^ *```\w*\n.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (\S.*)$", rest, re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return "\n".join([*blocks, *indented, *spans]).replace("\\\n", " ")


def calls_of(program: str, text: str) -> Iterator[list[str]]:
    """The words after `program` wherever code begins a line with it, comments cut off."""
    for line in code_of(text).splitlines():
        words = re.sub(r"\s#.*", "", line).split()
        if words and words[0].removeprefix(".venv/bin/") == program:
            yield words[1:]
