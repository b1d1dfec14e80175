"""report.html in a converted folder: the page that `report` makes, and never a reason to lose the checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, mla2dsa, quick_capture, small_conversion, small_flags  # noqa: F401  (a fixture)

from mla2dsa.exporters.report.page import page

pytestmark = pytest.mark.usefixtures("quick_capture")


def test_report_is_drawn_beside(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same page that `report` makes."""
    dsa = small_conversion(tmp_path_factory)
    made = page(json.loads((dsa / "report.json").read_text()), "dsa: dense and sparse side by side")
    assert (dsa / "report.html").read_text() == made
    assert made.count("<h2>Selections") == 1
    assert "report.html" in {file["name"] for file in json.loads((dsa / "mla2dsa.json").read_text())["files"]}


def missing(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return "no report.html: its plots need matplotlib; pip install 'mla2dsa[report]'"


def failing(monkeypatch: pytest.MonkeyPatch) -> str:
    def fail(*_: Any, **__: Any) -> str:
        raise ImportError("numpy.core failed")

    monkeypatch.setattr("mla2dsa.exporters.report.plots.lines", fail)
    return "no report.html: it could not be drawn; `mla2dsa report {} page.html` says why"


@pytest.mark.parametrize("fault", [missing, failing], ids=lambda fault: fault.__name__)
def test_without_a_page_the_checkpoint_is_written_all_the_same(
    fault: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, out = fault(monkeypatch), tmp_path / "dsa"
    done = mla2dsa("convert", TINY, out, *small_flags(tmp_path_factory), "--skip-transformers")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == said.format(out)
    assert (out / "report.json").exists()
    assert not (out / "report.html").exists()
    assert json.loads((out / "report.json").read_text())["verification"]["passed"]
