"""README's claims and what shows each: `tests/docs/claims.toml` against README.md, and docs/claims.md made of it.

python tests/helpers/claims.py > docs/claims.md
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HEAD = """# What shows what README says

Made of `tests/docs/claims.toml` by `python tests/helpers/claims.py`. A test sees to it that every paragraph, point and row of README.md
is in it, in README's own words, and that commands and tests are there. *Shown by* is for you to run; *kept by* runs for every commit. A
dash there is a figure that was measured once, by the command beside it, on the machine that README names.

| README says | shown by | kept by |
|---|---|---|
"""


@dataclass(frozen=True)
class Claim:
    """says: words of README. shown: a command. kept: files of tests, below tests/."""

    says: str
    shown: str
    kept: tuple[str, ...] = ()


def claims() -> list[Claim]:
    told = tomllib.loads((ROOT / "tests" / "docs" / "claims.toml").read_text())
    return [Claim(it["says"], it["shown"], tuple(it.get("kept", ()))) for it in told["claim"]]


def page(told: list[Claim]) -> str:
    rows = (
        f"| {_cell(it.says)} | `{_cell(it.shown)}` | {', '.join(f'`tests/{file}`' for file in it.kept) or '-'} |"
        for it in told
    )
    return HEAD + "\n".join(rows) + "\n"


def units(text: str) -> Iterator[str]:
    """Every paragraph, point of a list and row of a table, without code, headings and heads of tables; on one line."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\|.*\n(?=\|---)", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(#|\|---).*$", "", text, flags=re.MULTILINE)
    for part in re.split(r"\n\s*\n|\n(?=\* |\|)", text):
        if words := " ".join(part.split()):
            yield words


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(claims()), end="")
