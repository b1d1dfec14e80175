"""The page of a report: everything that was measured is on it, and nothing of it is code or fetched."""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from command_line import assert_refused, mla2dsa
from pages import HOSTILE, Seen
from reports import report, verification

from mla2dsa.exporters.report import plots
from mla2dsa.exporters.report.page import page
from mla2dsa.exporters.report.parts import number
from mla2dsa.files import temporary


def svgs(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>") for part in text.split("<svg")[1:]]


@pytest.fixture(scope="module")
def made() -> str:
    return page(report(), "a title")


def test_it_is_well_formed_and_fetches_nothing(made: str) -> None:
    seen = Seen(made)
    assert seen.open == []
    assert "script" not in seen.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in seen.links)
    assert "Content-Security-Policy" in made
    assert HOSTILE not in made
    assert "mathdefault" not in made  # numbers of axes as text, not as TeX
    assert made.count("&lt;script&gt;") >= 4  # the model's name, two origins, an excerpt, a check


def test_every_plot_has_ink_in_the_colour_of_each_curve(made: str) -> None:
    text, layers, depths, cost = (
        {"dsa", "oracle", "window", "dsa-fp8"},
        {"dsa", "oracle", "window", "chance"},
        {"dense", "dsa"},
        {"dense", "dsa"},
    )
    curves = [*[text] * 6, layers, depths, cost]
    drawn = [svg for svg in svgs(made) if not svg.findall(".//{*}image")]
    assert len(drawn) == len(curves)
    for svg, names in zip(drawn, curves, strict=True):
        used = "".join(element.get("style", "") for element in svg.iter() if element.tag.endswith(("path", "use")))
        assert all(plots.STYLES[name]["color"] in used for name in names)
        assert "currentColor" in ElementTree.tostring(svg, "unicode")
        assert svg.get("aria-label")


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_nothing_finite_is_said_and_not_drawn(value: float | None) -> None:
    found = report()
    for one in found["verification"]["text"]["by_selection"].values():
        one.update(kl=value, loss_delta=value, sequence_kls=[value] * 2)
        one["by_position"] = [{**stretch, "loss_delta": value, "kl": value} for stretch in one["by_position"]]
    text = page(found, "a title")
    assert text.count("no finite figure to draw") == 6  # the foreign text is the same one
    assert len(svgs(text)) == 5


def test_one_layer_and_one_sequence_have_the_tick_0() -> None:
    for svg in (plots.bars("one", {"dsa": [0.5]}, "layer", "y"), plots.maps("one", {"dsa": [[0.0, 1.0]]}, 9)):
        assert ">0<" in svg
        assert "\N{MINUS SIGN}" not in svg


@pytest.mark.parametrize(
    ("value", "shape", "text"),
    [(1.5, "+.4f", "+1.5000"), (1e12, "+.4f", "1e+12"), (-2.5e8, ".0f", "-2.5e+08"), (9999999.0, ".0f", "9999999")],
)
def test_numbers_are_no_longer_than_a_cell(value: float, shape: str, text: str) -> None:
    assert number(value, shape) == text


def pixels(svg: ElementTree.Element) -> list[Any]:
    """RGBA of the panels of a map, [layers, stretches, 4]."""
    from matplotlib.image import imread

    links = [
        image.get("{http://www.w3.org/1999/xlink}href", "") for image in svg.iter("{http://www.w3.org/2000/svg}image")
    ]
    return [imread(io.BytesIO(base64.b64decode(link.partition(",")[2])), format="png") for link in links]


def test_maps_are_as_opaque_as_what_is_chosen(made: str) -> None:
    """Every layer of the first panel takes more of its keys than the one before, and all of the second the same."""
    drawn = [svg for svg in svgs(made) if svg.findall(".//{*}image")]
    assert [svg.get("aria-label") for svg in drawn] == ["Query at position 100", "Query at position 200"]
    for svg, position in zip(drawn, (100, 200), strict=True):
        dsa, oracle = (panel[:, :, 3] for panel in pixels(svg))
        keys = (position + 1) / 12
        thirds = [dsa[len(dsa) * n // 3 + len(dsa) // 6].mean() for n in range(3)]
        assert thirds == pytest.approx([n / keys for n in range(3)], abs=0.01)
        assert oracle.mean() == pytest.approx(position // 20 / keys, abs=0.01)
        assert oracle.std() < 0.01


def test_a_report_without_maps_has_no_such_part() -> None:
    old = report()
    for layer in [*old["verification"]["layers"], *old["verification"]["foreign"]["layers"]]:
        layer.pop("maps", None)
    assert "<h2>Selections" not in page(old, "")
    assert "<h2>Selections" in page(report(), "")


def test_ids_of_plots_do_not_meet(made: str) -> None:
    ids = [found for svg in svgs(made) for element in svg.iter() if (found := element.get("id"))]
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', made)
    assert set(used) <= set(ids)
    assert len(used) > 100


@pytest.mark.parametrize(
    "part", ["+0.0100", "97.5", "-0.25", "model.layers.2.self_attn", "transformers: no class", "-</td>"]
)
def test_figures_are_on_it(made: str, part: str) -> None:
    assert part in made


def test_a_layer_that_is_well_is_not_listed(made: str) -> None:
    assert "model.layers.2.self_attn" in page(report(), "")
    fine = report()
    for layer in fine["verification"]["layers"]:
        layer["dsa"] = layer["oracle"]
    assert "model.layers" not in page(fine, "")


def test_a_failure_stands_first() -> None:
    failed = page(report(passed=False), "a title")
    assert failed.index("Failed") < failed.index("<h2>")
    assert "more text" in failed
    assert "more text" not in page(report(), "a title")


def test_the_command_writes_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(json.dumps(verification()))
    done = mla2dsa("report", tmp_path / "found.json", tmp_path / "page.html")
    assert (done.code, done.out) == (0, f"{tmp_path / 'page.html'}: written\n")
    before = (tmp_path / "page.html").read_text()
    assert "<h2>Checks</h2>" in before
    refused = mla2dsa("report", tmp_path / "found.json", tmp_path / "page.html")
    assert_refused(refused, 2, tmp_path / "page.html", "there already")
    assert (tmp_path / "page.html").read_text() == before


@pytest.mark.parametrize(
    ("content", "part"),
    [
        pytest.param({"verification": None}, "was not verified", id="not-verified"),
        pytest.param({"layers": []}, "neither a report.json", id="other-json"),
        pytest.param(
            {"verification": {**verification(), "layers": [{"dsa": "many"}]}}, "neither a report.json", id="words"
        ),
        pytest.param({"checks": 1, "text": {}, "layers": []}, "neither a report.json", id="other-kinds"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: dict[str, Any], part: str) -> None:
    (tmp_path / "found.json").write_text(json.dumps(content))
    done = mla2dsa("report", tmp_path / "found.json", tmp_path / "page.html")
    assert_refused(done, 1, tmp_path / "found.json", part)
    assert not (tmp_path / "page.html").exists()


def luminance(colour: str) -> float:
    """Of #rrggbb, as WCAG has it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", plots.STYLES)
def test_curves_are_seen_on_white_and_on_black(name: str) -> None:
    found = luminance(plots.STYLES[name]["color"])
    assert 1.05 / (found + 0.05) >= 3
    assert (found + 0.05) / 0.05 >= 3


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "found.json").write_text(json.dumps(verification()))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = mla2dsa("report", tmp_path / "found.json", tmp_path / "page.html")
    assert_refused(done, 2, "pip install 'mla2dsa[report]'")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "found.json").write_text(json.dumps(verification()))

    def full(file: Path, content: object) -> None:
        file.write_bytes(b"<!doctype")
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(temporary, "write_new", full)
    done = mla2dsa("report", tmp_path / "found.json", tmp_path / "page.html")
    assert_refused(done, 1, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_two_drawings_are_the_same_bytes(made: str) -> None:
    assert page(report(), "a title") == made


@pytest.mark.parametrize(
    "rc",
    [
        pytest.param({"svg.image_inline": False}, id="images-in-files"),
        pytest.param({"text.usetex": True}, id="tex"),
        pytest.param({"font.size": 30, "axes.grid": True}, id="looks"),
    ],
)
def test_the_users_settings_of_matplotlib_are_not_heard(
    rc: dict[str, Any], made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context(rc):
        assert page(report(), "a title") == made
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_is_none_is_not_heard(tmp_path: Path) -> None:
    """matplotlib itself cannot be imported then."""
    (tmp_path / "found.json").write_text(json.dumps(verification()))
    call = [sys.executable, "-P", "-m", "mla2dsa", "report", "found.json", "page.html"]
    environment = {**os.environ, "MPLBACKEND": "nonsense"}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "<h2>Checks</h2>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("odd", ["\udcff", "\x00", "\x1b[31m", "\x9f", "\uffff"], ids=ascii)
def test_what_no_page_can_hold_is_replaced(odd: str) -> None:
    given = report()
    given["verification"]["origin"] = f"/path{odd}/text"
    text = page(given, f"a{odd}b")
    text.encode()
    assert odd not in text
    assert "/path\ufffd" in text
    assert "<h1>a\ufffd" in text


@pytest.mark.parametrize(
    ("field", "value"), [("dsa", []), ("position", -1), ("position", 10**400)], ids=["no-bins", "before", "far"]
)
def test_a_damaged_map_is_one_line(field: str, value: Any, tmp_path: Path) -> None:
    found = verification()
    for layer in found["layers"]:
        layer["maps"][0][field] = value
    (tmp_path / "found.json").write_text(json.dumps(found))
    done = mla2dsa("report", tmp_path / "found.json", tmp_path / "page.html")
    assert_refused(done, 1, tmp_path / "found.json", "neither a report.json")


def test_a_library_that_cannot_be_imported_is_said_before_work(tmp_path: Path) -> None:
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError('numpy.core failed')")
    (tmp_path / "found.json").write_text(json.dumps(verification()))
    call = [sys.executable, "-P", "-m", "mla2dsa", "report", "found.json", "page.html"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "matplotlib is installed, but cannot be imported (ImportError: numpy.core failed)" in done.stderr


def test_a_place_that_cannot_be_written_to_is_said_before_work(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("{}")
    done = mla2dsa("report", tmp_path / "found.json", "/proc/page.html")
    assert_refused(done, 1, "/proc: cannot be written to", "give another place for page.html")
