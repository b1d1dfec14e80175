"""docs/claims.md: every part of README is in it, its words are README's, and what it says shows or keeps them is there."""

from __future__ import annotations

import re
import shlex

import pytest
from claims import Claim, claims, page, units
from places import ROOT

README = (ROOT / "README.md").read_text()
FLAT = " ".join(README.split())
CLAIMS = claims()


def test_the_page_is_made_of_the_claims() -> None:
    """Another README or another claim: `python tests/helpers/claims.py > docs/claims.md`."""
    assert (ROOT / "docs" / "claims.md").read_text() == page(CLAIMS)


@pytest.mark.parametrize("unit", list(units(README)), ids=lambda unit: unit[:40])
def test_every_part_of_the_readme_is_claimed(unit: str) -> None:
    assert [claim.says for claim in CLAIMS if claim.says in unit]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.says[:40])
def test_a_claim_is_the_readmes_and_is_shown(claim: Claim) -> None:
    assert claim.says in FLAT
    assert all((ROOT / "tests" / file).is_file() for file in claim.kept)
    assert unknown(claim.shown) == []


@pytest.mark.parametrize(
    ("shown", "missing"),
    [
        ("python benchmarks/none.py", ["benchmarks/none.py"]),
        ("python benchmarks/v3.py plan --no-such", ["--no-such"]),
        ("make demo nothing", ["nothing"]),
        ("pytest tests/none", ["tests/none"]),
    ],
)
def test_what_is_not_there_is_noticed(shown: str, missing: list[str]) -> None:
    assert unknown(shown) == missing


def test_parts_of_a_text() -> None:
    text = "# Head\n\none\ntwo\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\ncode\n```\n* x\n  y\n* z\n"
    assert list(units(text)) == ["one two", "| 1 | 2 |", "* x y", "* z"]


def unknown(command: str) -> list[str]:
    """Words of a command that name something which is not there. `mla2dsa ...`: tests/test_documentation.py asks its parser."""
    program, *words = shlex.split(command)
    if program == "make":
        targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return [word for word in words if word not in targets]
    files = [word for word in words if word.startswith(("benchmarks/", "tests/"))]
    if missing := [word for word in files if not (ROOT / word).exists()]:
        return missing
    script = (ROOT / files[0]).read_text() if program == "python" and files else ""
    return [word for word in words if program == "python" and word.startswith("--") and f'"{word}"' not in script]
