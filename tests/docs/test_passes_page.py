"""docs/passes.md shows the example's files as they are, and its code runs."""

import re
from typing import Any

import families
import pytest
from places import ROOT

from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.passes.manager import Run

PAGE = (ROOT / "docs" / "passes.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["drop_casts.py", "test_drop_casts.py"])
def test_the_page_shows_the_file_that_is_tested(name: str) -> None:
    assert (ROOT / "examples" / "passes" / name).read_text() in BLOCKS


def test_the_example_runs_among_our_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """float32 DeepSeek-V3: every norm and the router cast to float32 and back."""
    _, program = families.exported("deepseek_v3", "sdpa")
    names: dict[str, Any] = {"program": program, "config": IndexerConfig(4, 4, 16)}
    exec(compile(BLOCKS[-1], "docs/passes.md", "exec"), names)
    run: Run = names["run"]
    assert [step.name for step in run.steps] == ["drop_casts", "normalize", "find_mla", "functionalise", "mla_to_dsa"]
    dropped = run.fact(names["Dropped"])
    assert dropped.casts > 10
    assert run.steps[0].nodes_before - run.steps[0].nodes_after == dropped.casts
    printed = capsys.readouterr().out
    assert f"Dropped(casts={dropped.casts}" in printed
    assert "mla_to_dsa, " in printed
