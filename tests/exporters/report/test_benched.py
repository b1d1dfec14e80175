"""The page of what bench prints: every figure, run and ratio is on it, and nothing of it is code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_refused, mla2dsa
from pages import HOSTILE, Seen
from reports import benchmark, report

from mla2dsa.exporters.report import plots
from mla2dsa.exporters.report.benched import benched_page, measured_cost, row_names

SEVEN = tuple(f"models/{n}" for n in range(7))


def test_every_figure_is_on_the_page_and_nothing_is_code() -> None:
    text = benched_page(benchmark(), HOSTILE)
    seen = Seen(text)
    assert seen.open == []
    assert "script" not in seen.tags
    assert HOSTILE not in text
    assert "Batch 2, 1 of 2 CPUs, torch 2.13.0" in text
    assert "medians of 3 rounds" in text
    for figure in (
        "40.96",
        "100",
        "10.0",
        "8.00",
        "3.00",
        "20.48",
        "1.50 to 2.50",
        "0.50 to 2.50: no difference shown",
        "0.75",
    ):
        assert f">{figure}<" in text
    assert text.count("<figure>") == 2


def test_one_round_says_that_it_tells_nothing() -> None:
    text = benched_page(benchmark(rounds=1), "a title")
    assert text.count("one round: no telling") == 4


def test_a_model_alone_is_compared_with_nothing() -> None:
    text = benched_page(benchmark(models=("dense",)), "a title")
    assert "Against" not in text
    assert text.count("<figure>") == 2


def test_every_model_has_a_curve_and_every_run_a_mark() -> None:
    results = {name: [(512.0, 5.0, [4.0, 5.0, 6.0]), (1024.0, 3.0, [3.0])] for name in SEVEN}
    svg = plots.speeds("speeds", results, "x", "y")
    assert all(f">{name}<" in svg for name in SEVEN)
    assert "long-" * 5 not in plots.speeds("speeds", {"long-" * 20: results[SEVEN[0]]}, "x", "y")
    assert svg.count("<use") >= 7 * (2 + 3 + 1)


def test_dense_and_dsa_look_as_on_other_plots() -> None:
    alone = plots.speeds("speeds", {"first": [(512.0, 5.0, [5.0])]}, "x", "y")
    both = plots.speeds("speeds", {name: [(512.0, 5.0, [5.0])] for name in ("first", "second")}, "x", "y")
    colours = {name: plots.STYLES[name]["color"] for name in ("dense", "dsa")}
    assert {name: colour in alone for name, colour in colours.items()} == {"dense": True, "dsa": False}
    assert all(colour in both for colour in colours.values())


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (("x/dense", "y/dsa"), ["dense", "dsa"]),
        (("x/same", "y/same", "z"), ["x/same", "y/same", "z"]),
        (("/", "."), ["/", "."]),
    ],
)
def test_rows_have_names_that_differ(models: tuple[str, ...], names: list[str]) -> None:
    assert list(row_names(models).values()) == names


def test_report_draws_it(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(benchmark()))
    done = mla2dsa("report", tmp_path / "b.json", tmp_path / "page.html")
    assert (done.code, done.err) == (0, "")
    assert "<title>b.json: how fast</title>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("found", [{"results": []}, {"results": [{}], "against": []}, {"results": 3}], ids=str)
def test_what_is_no_benchmark_is_refused(found: Any, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(found))
    done = mla2dsa("report", tmp_path / "b.json", tmp_path / "page.html")
    assert_refused(done, 1, "neither a report.json", "`bench --json`")
    assert not (tmp_path / "page.html").exists()


def of_report(folder: Path, bench: Any, of: Any = None) -> Any:
    (folder / "r.json").write_text(json.dumps(of or report()))
    (folder / "b.json").write_text(json.dumps(bench))
    return mla2dsa("report", folder / "r.json", folder / "page.html", "--bench", folder / "b.json")


def test_a_report_has_measured_beside_counted_cost(tmp_path: Path) -> None:
    done = of_report(tmp_path, benchmark())
    assert (done.code, done.err) == (0, "")
    text = (tmp_path / "page.html").read_text()
    assert Seen(text).open == []
    assert HOSTILE not in text
    cost = text.partition("<h2>Cost by position</h2>")[2].partition("<h2>Checks</h2>")[0]
    captions = ["all layers, counted", "decode, measured, ms a token", "prefill, measured, ms a token"]
    assert [caption in cost for caption in captions] == [True] * 3
    assert cost.count("<figure>") == 3
    assert "Batch 2, 1 of 2 CPUs" in cost
    assert ">1.50 to 2.50<" in cost


def test_cost_is_the_time_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 tokens a second, ten times less in decode, and 100, 101, 102 in the rounds."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "speeds", lambda name, series, *_: drawn.setdefault(name, series) and "<svg></svg>")
    measured_cost(benchmark())
    decode, prefill = (drawn[f"{kind}, measured, ms a token"]["dense"] for kind in ("decode", "prefill"))
    assert [point[0] for point in decode] == [512, 4096]
    assert decode[0][1] == pytest.approx(100.0)
    assert prefill[0][1:] == (pytest.approx(10.0), pytest.approx([10.0, 1e3 / 101, 1e3 / 102]))


def test_a_verification_alone_has_measured_cost(tmp_path: Path) -> None:
    assert of_report(tmp_path, benchmark(), report()["verification"]).code == 0
    assert "measured, ms a token" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "found",
    [{}, {"results": []}, {"results": [{}], "against": []}, report()],
    ids=["empty", "none", "bare", "report"],
)
def test_what_no_bench_printed_is_refused(found: Any, tmp_path: Path) -> None:
    assert_refused(of_report(tmp_path, found), 1, "b.json: not what `bench --json` prints")
    assert not (tmp_path / "page.html").exists()


def test_bench_belongs_to_a_verification(tmp_path: Path) -> None:
    assert_refused(
        of_report(tmp_path, benchmark(), benchmark()), 2, "--bench: is drawn beside a verification", "r.json"
    )
    assert not (tmp_path / "page.html").exists()
