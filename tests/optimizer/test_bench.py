"""`bench`: the order of runs, what is made of them, and real models timed in processes of their own."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import TINY, assert_refused, mla2dsa, small_conversion
from hypothesis import given
from hypothesis import strategies as st

from mla2dsa.commands.show.bench import show_bench
from mla2dsa.errors import UsageError, UserError
from mla2dsa.optimizer.answers import timing
from mla2dsa.optimizer.answers.timing import WARM_UP, Run, peak_memory, timed, timed_apart
from mla2dsa.optimizer.bench import MOST_ROUNDS, bench, ratio
from mla2dsa.optimizer.export import export

SPEEDS = st.lists(st.floats(0.01, 100), min_size=2, max_size=MOST_ROUNDS)


def answered(raised: str) -> str:
    return f'import os, sys; os.write(int(sys.argv[1]), b\'{{"raised": "{raised}", "said": "it"}}\')'


def clock(speeds: dict[str, list[float]], asked: list[Run]) -> Callable[[Run], dict[str, Any]]:
    """A stand-in that gives each model its speeds in turn."""
    left = {model: list(values) for model, values in speeds.items()}

    def time_it(run: Run) -> dict[str, Any]:
        asked.append(run)
        speed = left[run.model].pop(0)
        return {
            "runtime": "torch", "dtype": run.dtype, "batch": run.batch, "context": run.context or 100, "prefill_seconds": 1 / speed,
            "prefill_tokens_per_second": speed, "decode_tokens_per_second": 10 * speed, "peak_memory": int(1000 * speed),
            "decode_ms": {"p50": 1 / speed, "p99": 2 / speed}, "torch": "2", "threads": 1, "gpu": None, "cpus": 2, "device": "cpu",
        }  # fmt: skip

    return time_it


def test_models_take_turns_and_the_longest_context_comes_first() -> None:
    asked: list[Run] = []
    found = bench(("a", "b"), (10, 30), rounds=2, time_it=clock({"a": [1, 2, 3, 4], "b": [2, 4, 6, 8]}, asked))
    assert [(run.context, run.model) for run in asked] == [(30, "a"), (30, "b"), (10, "a"), (10, "b")] * 2
    assert [(one["context"], one["model"]) for one in found["results"]] == [(10, "a"), (10, "b"), (30, "a"), (30, "b")]
    assert [one["prefill_tokens_per_second"] for one in found["results"]] == [3, 6, 2, 4]  # medians of 2 and 4, ...
    assert [one["peak_memory"] for one in found["results"]] == [3000, 6000, 2000, 4000]
    assert [(one["model"], one["first"], one["context"]) for one in found["against"]] == [
        ("b", "a", 10),
        ("b", "a", 30),
    ]
    for one in found["against"]:
        assert one["prefill"] == one["decode"]
        assert one["prefill"]["ratio"] == pytest.approx(2)
        assert one["prefill"]["differs"] is True
        assert one["peak_memory"] == 2


def test_what_the_first_model_takes_is_what_all_are_given() -> None:
    asked: list[Run] = []
    bench(("a", "b"), rounds=1, time_it=clock({"a": [1], "b": [1]}, asked))
    assert [run.context for run in asked] == [None, 100]


def test_a_machine_that_changes_its_speed_is_no_difference_of_models() -> None:
    """Ratios within rounds, where medians of each model alone would say twice as fast."""
    found = bench(("a", "b"), rounds=3, time_it=clock({"a": [1, 5, 1.1], "b": [1.01, 5.2, 1.05]}, []))
    assert found["against"][0]["prefill"]["differs"] is False
    assert found["against"][0]["prefill"]["ratio"] == pytest.approx((1.01 * 1.04 * 1.05 / 1.1) ** (1 / 3))


@given(SPEEDS)
def test_ratio_is_a_mean_with_its_interval(rounds: list[float]) -> None:
    found = ratio(rounds)
    assert found["ratio"] == pytest.approx(statistics.geometric_mean(rounds))
    assert found["low"] <= found["ratio"] * (1 + 1e-9)
    assert found["high"] >= found["ratio"] * (1 - 1e-9)
    turned = ratio([1 / value for value in rounds])
    assert turned["ratio"] == pytest.approx(1 / found["ratio"])
    assert turned["low"] == pytest.approx(1 / found["high"])
    if not math.isclose(min(found["low"], 1 / found["high"]), 1, abs_tol=1e-9):
        assert found["differs"] is not (found["low"] <= 1 <= found["high"])


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """1 lies outside of the 95 % interval of equal models' ratios in one case of twenty."""
    generator = torch.Generator().manual_seed(0)
    for rounds in (2, 3, 5, MOST_ROUNDS):
        logs = torch.randn(4000, rounds, generator=generator, dtype=torch.float64) * 0.1
        share = sum(ratio(row.exp().tolist())["differs"] for row in logs) / len(logs)
        assert share == pytest.approx(0.05, abs=0.012)


def test_one_round_says_nothing_of_its_spread() -> None:
    assert ratio([2.0]) == {"ratio": pytest.approx(2), "low": None, "high": None, "differs": None}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        pytest.param({"tokens": 0}, "--tokens 0: expected 1", id="tokens"),
        pytest.param({"batch": 0}, "--batch 0: expected 1", id="batch"),
        pytest.param({"contexts": (16, 0)}, "--context 0: expected 1", id="context"),
        pytest.param({"rounds": 0}, "--rounds 0", id="no-rounds"),
        pytest.param({"rounds": MOST_ROUNDS + 1}, f"1 to {MOST_ROUNDS}", id="rounds"),
        pytest.param({"models": ("a", "a")}, "given twice", id="twice"),
    ],
)
def test_sizes_out_of_range(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        bench(**{"models": ("a",), **arguments}, time_it=clock({}, []))


# Real models


@pytest.fixture(scope="module")
def dsa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_conversion(tmp_path_factory)


def test_dense_sparse_and_exported_side_by_side(dsa: Path, tmp_path: Path) -> None:
    onnx = export(dsa, tmp_path / "onnx", max_seq=128).folder
    done = mla2dsa("bench", TINY, dsa, onnx, "--context", 48, "--tokens", 3, "--rounds", 1, "--json")
    assert (done.code, done.err) == (0, "")
    results = done.json()["results"]
    assert [(one["model"], one["runtime"]) for one in results] == [
        (str(TINY), "torch"), (str(dsa), "torch"), (str(onnx), "onnxruntime"),
    ]  # fmt: skip
    for one in results:
        assert (one["batch"], one["context"], one["device"]) == (1, 48, "cpu")
        assert one["prefill_tokens_per_second"] == pytest.approx(48 / one["prefill_seconds"])
        assert 0 < one["decode_ms"]["p50"] <= one["decode_ms"]["p90"] <= one["decode_ms"]["p99"]
        assert 2**26 < one["peak_memory"] < 2**33
    assert [one["model"] for one in done.json()["against"]] == [str(dsa), str(onnx)]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are timed in this process."""
    monkeypatch.setattr("mla2dsa.optimizer.bench.timed_apart", timed)


@pytest.mark.usefixtures("here")
def test_the_default_is_what_the_model_takes_and_a_table_says_so(dsa: Path) -> None:
    done = mla2dsa("bench", dsa, "--tokens", 2, "--rounds", 1)
    assert (done.code, done.err) == (0, "")
    assert f" {1024 - 2 - WARM_UP} " in done.out
    assert "against" not in done.out
    assert "medians of 1 round\n" in done.out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        pytest.param(("--context", "2k"), 1, ("2048 + 5 tokens exceed the 1024",), id="long"),
        pytest.param(("--context", "many"), 2, ("--context many", "4k,8k"), id="words"),
        pytest.param(("--context", ""), 2, ("--context :", "4k,8k"), id="nothing"),
        pytest.param(("--context", "1_0,\u0664"), 2, ("4k,8k",), id="python-numbers"),
        pytest.param(("--context", "0"), 2, ("--context 0: expected 1 to",), id="zero"),
        pytest.param(("--batch", 10**23), 2, (f"--batch {10**23}",), id="batch"),
        pytest.param(("--context", "16,16"), 2, ("given twice",), id="same"),
        pytest.param(("--runtime", "onnxruntime"), 1, ("which onnxruntime cannot run",), id="runtime"),
        pytest.param(("--device", "nonsense"), 2, ("--device nonsense", "pass cpu or cuda"), id="device"),
    ],
)
def test_refusals(flags: tuple[str, ...], code: int, parts: tuple[str, ...], dsa: Path) -> None:
    assert_refused(mla2dsa("bench", dsa, "--tokens", 2, *flags), code, *parts)


def test_a_model_by_two_names_is_one(dsa: Path) -> None:
    assert_refused(mla2dsa("bench", dsa, dsa.parent / "." / dsa.name, f"{dsa}/"), 2, "given twice")


def test_rows_have_names_that_differ_and_nothing_is_markup(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = {"a/same[int4]": [1.0], "b/same[int4]": [2.0], "c/\x1b[31mred": [3.0]}
    show_bench(bench(list(speeds), (10,), rounds=1, time_it=clock(speeds, [])))
    said = capsys.readouterr().out
    assert "\x1b" not in said
    for name in ("a/same[int4]", "b/same[int4]", "\\x1b[31mred"):
        assert f"\n {name} " in said
    assert "b/same[int4] against a/same[int4], 10 tokens: prefill 2.00x" in said


# The process of a run


def standing_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """The new process runs `script` in the place of the module."""
    (tmp_path / "stand_in_for_timing.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(timing, "__spec__", SimpleNamespace(name="stand_in_for_timing"))


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        pytest.param(
            "import os; os.kill(os.getpid(), 9)", UserError, r"some: .* exit code -9 \(killed, most", id="killed"
        ),
        pytest.param("raise SystemExit(3)", UserError, r"ended with exit code 3; give", id="ended"),
        pytest.param(answered("usage"), UsageError, "^it$", id="usage"),
        pytest.param(answered("user"), UserError, "^it$", id="user"),
        pytest.param(answered("other"), RuntimeError, "^it$", id="other"),
    ],
)
def test_what_ends_a_run_is_one_line(
    script: str, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    standing_in(monkeypatch, tmp_path, script)
    with pytest.raises(kind, match=said) as raised:
        timed_apart(Run("some", 1, 7, 1))
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UsageError("no"), {"raised": "usage", "said": "no"}),
        (UserError("no"), {"raised": "user", "said": "no"}),
        (OSError(28, "No space left", "/a"), {"raised": "user", "said": "/a: No space left"}),
        (MemoryError(), {"raised": "user", "said": "some: out of memory; give a smaller --context or --batch"}),
        (KeyError("x"), {"raised": "other", "said": "KeyError: 'x'"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_a_run_raises_is_told(error: Exception, said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Run) -> Any:
        raise error

    monkeypatch.setattr(timing, "timed", fail)
    monkeypatch.setattr(timing, "_end_with_the_other", lambda: None)
    ours, theirs = os.pipe()
    timing.main(theirs, Run("some", 1, 7, 1))
    with open(ours) as told:
        assert json.load(told) == said


def test_its_process_says_nothing_beside_what_it_answers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A thread of it waits for ours to end, while Python clears up what threads may hold."""
    with pytest.raises(UserError):
        timed_apart(Run(str(tmp_path), 1, 16, 1))
    assert capfd.readouterr() == ("", "")


def test_it_ends_with_the_process_that_waits_for_it(tmp_path: Path) -> None:
    """And takes no module from the folder it is started in."""
    (tmp_path / "signal.py").write_text("print('taken')")
    (tmp_path / "run.py").write_text(
        "from mla2dsa.optimizer.answers import timing\n"
        f"timing.timed_apart(timing.Run({str(TINY)!r}, 1, 16, 100_000_000))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-P", tmp_path / "run.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    child = children(parent.pid)
    parent.kill()
    said, _ = parent.communicate()
    assert said == ""
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(parent: int) -> int:
    """The number of its first child, once there is one."""
    file, deadline = Path(f"/proc/{parent}/task/{parent}/children"), time.monotonic() + 30
    while not (found := file.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(found[0])


def test_peak_memory_is_what_was_used_even_when_it_is_free_again() -> None:
    before = peak_memory()
    held = torch.ones(max(before, 2**27) // 4, dtype=torch.float32).numel()
    assert held * 4 <= peak_memory() < before + held * 4 + 2**28
