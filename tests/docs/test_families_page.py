"""docs/families.md: its table is what benchmarks/family_table.py found, a row a family, and a row is what every verb does."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkpoints import edit_config
from families import build
from places import ROOT

from mla2dsa.exporters.dsa.families import FAMILIES, NO_CLASS

PAGE = (ROOT / "docs" / "families.md").read_text()
ROWS = json.loads((ROOT / "benchmarks" / "results" / "family_table.json").read_text())


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families_table", ROOT / "benchmarks" / "family_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families_table"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_of_the_results(script: ModuleType) -> None:
    assert script.page(PAGE, ROWS) == PAGE
    lines = [line for line in script.table(ROWS).splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(ROWS)
    assert all(line in PAGE for line in lines)


@pytest.mark.parametrize("family", [*(family.name for family in FAMILIES), *NO_CLASS])
def test_every_family_has_a_row(family: str) -> None:
    assert any(name.startswith(family) for name in ROWS)


def test_what_does_not_work_has_its_reason(script: ModuleType) -> None:
    for name, row in ROWS.items():
        assert set(row) == {*script.VERBS, "layout", "targets"}, name
        after = [reason for verb in script.VERBS if (reason := row[verb]) and reason.startswith("after ")]
        assert all(row[reason.removeprefix("after ")] for reason in after), name


def test_a_row_is_what_every_verb_does(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    build("youtu", pad_token_id=None).save_pretrained(tmp_path / "youtu")  # type: ignore[operator]
    row = script.row(tmp_path / "youtu", tmp_path / "place")
    assert {"transformers", "sglang"} <= set(row.pop("targets"))
    assert row == {"layout": "deepseek_v32", **dict.fromkeys(script.VERBS)}


def test_another_text_is_no_agreement(script: ModuleType) -> None:
    with pytest.raises(script.UserError, match=r"greedy text is \[2\], onnxruntime's \[1\]"):
        script._same_text("onnxruntime", [1], [2])


def test_a_row_says_why_not(script: ModuleType, tmp_path: Path) -> None:
    build("youtu").save_pretrained(tmp_path / "youtu")  # type: ignore[operator]
    edit_config(tmp_path / "youtu", {"transformers_weights": "x"})
    row = script.row(tmp_path / "youtu", tmp_path)
    assert "transformers_weights names the weight files" in row["plan"]
    assert {row[verb] for verb in ("convert", "verify", "export", "generate", "strip")} <= {
        "after plan",
        "after convert",
    }
