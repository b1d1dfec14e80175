"""The page of two models' answers: every text and token of what compare prints is on it, and nothing of it is code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_refused, mla2dsa
from pages import HOSTILE, Seen
from reports import position, prompt

from mla2dsa.exporters.report.compared import compared_page


def made(*prompts: dict[str, Any], topk: int | None = 64) -> str:
    return compared_page({"index_topk": topk, "prompts": list(prompts)}, HOSTILE)


def test_everything_is_on_the_page_and_nothing_is_code() -> None:
    text = made(prompt(), prompt(first_difference=None, mean_kl=None))
    seen = Seen(text)
    assert seen.open == []
    assert "script" not in seen.tags
    assert HOSTILE not in text
    assert "1 of 2 prompts have the same greedy text" in text
    assert "part at token 2" in text
    assert '<mark title="rank 3 in DSA, KL 1.500">&lt;b&gt;</mark>\N{EURO SIGN}</pre>' in text
    assert seen.links == []


@pytest.mark.parametrize(
    ("topk", "said"), [(64, False), (93, True), (None, False)], ids=["longer", "as-long", "unknown"]
)
def test_a_prompt_that_is_dense_anyway_is_said_to_be(topk: int | None, said: bool) -> None:
    assert ("here DSA is dense attention" in made(prompt(), topk=topk)) is said


def test_of_a_long_prompt_the_end_is_shown() -> None:
    text = made(prompt(prompt="a" * 1000 + "b" * 600))
    assert "b" * 600 in text
    assert "... b" in text


def test_the_command_needs_no_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "c.json").write_text(
        json.dumps({"index_topk": 64, "prompts": [prompt(positions=[position("x", kl=None)])]})
    )
    assert mla2dsa("report", tmp_path / "c.json", tmp_path / "page.html").code == 0
    assert "side by side</h1>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("found", [{"prompts": [{}]}, {"prompts": 3, "index_topk": 1}], ids=["empty", "a-number"])
def test_another_json_is_one_line(found: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(found))
    assert_refused(mla2dsa("report", tmp_path / "c.json", tmp_path / "page.html"), 1, "neither a report.json")
    assert not (tmp_path / "page.html").exists()
