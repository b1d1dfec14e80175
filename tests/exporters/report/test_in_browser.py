"""A report as a browser shows it: every plot has ink, nothing hangs over, axe-core finds no serious fault; light, dark, narrow, wide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import LOOKS, NARROW, chromium, coloured, faults, ink, overhang, pixels, shown, with_browser
from reports import benchmark, prompt, report

from mla2dsa.exporters.report import plots
from mla2dsa.exporters.report.benched import benched_page, measured_cost
from mla2dsa.exporters.report.compared import compared_page
from mla2dsa.exporters.report.page import page
from mla2dsa.exporters.report.parts import document

pytestmark = with_browser
DSA = plots.STYLES["dsa"]["color"]
LINES = (
    "cell => { const all = document.createRange(); all.selectNodeContents(cell); return all.getClientRects().length }"
)
SMALLEST = 8.0  # pixels: height of a line of text that can be read on a telephone


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    texts = {
        "report": page(report(), "a title", measured_cost(benchmark())),
        "failed": page(report(passed=False), "a title"),
        "compared": compared_page({"index_topk": 64, "prompts": [prompt(), prompt(prompt="long " * 99)]}, "two models"),
        "benched": benched_page(benchmark((*"abcdefg", "long-" * 20)), "how fast"),
        "faint": document("faint", ['<p style="color: #777; background: #888">hardly to be read</p>']),
        "broad": document("broad", ['<div style="width: 4000px">hangs over</div>']),
        "blank": document(
            "blank", ['<figure><svg viewBox="0 0 10 10" role="img" aria-label="nothing"></svg></figure>']
        ),
        "scripted": document("scripted", ["<script>document.title</script>"]),
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: (folder / f"{name}.html").as_uri() for name in texts}


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
@pytest.mark.parametrize("name", ["report", "failed", "compared", "benched"])
def test_it_can_be_read(browser: Any, urls: dict[str, str], name: str, scheme: str, width: int) -> None:
    with shown(browser, urls[name], scheme, width) as seen:
        assert faults(seen) == []
        assert overhang(seen) <= 0
        assert seen.locator("h1").is_visible()


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_every_plot_has_ink(browser: Any, urls: dict[str, str], scheme: str, width: int) -> None:
    with shown(browser, urls["report"], scheme, width) as seen:
        drawn = seen.locator("figure svg").all()
        assert len(drawn) == 13  # 3 for each of two texts, layers, two maps, one by depth, three of cost
        for svg in drawn:
            painted = pixels(svg)
            assert ink(painted) > 0.01
            curves = not svg.locator("image").count()  # a map is as faint as what is chosen
            assert not curves or coloured(painted, DSA) > 0.0001, svg.get_attribute("aria-label")
            letters = svg.locator("text").first.bounding_box()
            assert letters
            assert letters["height"] >= SMALLEST


def test_numbers_are_not_broken(browser: Any, urls: dict[str, str]) -> None:
    """A cell that holds a number is as high as its line."""
    with shown(browser, urls["report"], width=NARROW) as seen:
        cells = seen.locator("td.number").all()
        assert len(cells) > 30
        for cell in cells:
            rows = cell.evaluate(LINES)
            assert rows == 1, cell.inner_text()


def test_what_is_looked_for_would_be_found(browser: Any, urls: dict[str, str]) -> None:
    with shown(browser, urls["faint"]) as seen:
        assert any(fault.startswith("color-contrast") for fault in faults(seen))
    with shown(browser, urls["broad"], width=NARROW) as seen:
        assert overhang(seen) > 1000
    with shown(browser, urls["blank"]) as seen:
        assert ink(pixels(seen.locator("svg"))) < 0.01
        assert coloured(pixels(seen.locator("body")), DSA) == 0
    with pytest.raises(AssertionError, match="Content Security Policy"), shown(browser, urls["scripted"]):
        pass
