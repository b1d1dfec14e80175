"""`bench`: the order of runs, what is made of them, and real models timed in processes of their own."""

from __future__ import annotations

import math
import os
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY, assert_refused, mla2dsa, small_conversion
from hypothesis import given
from hypothesis import strategies as st

from mla2dsa.errors import UsageError, UserError
from mla2dsa.optimizer.answers.timing import WARM_UP, Run, peak_memory, timed_apart
from mla2dsa.optimizer.bench import MOST_ROUNDS, bench, ratio
from mla2dsa.optimizer.export import export

SPEEDS = st.lists(st.floats(0.01, 100), min_size=2, max_size=MOST_ROUNDS)


def clock(speeds: dict[str, list[float]], asked: list[Run]) -> Callable[[Run], dict[str, Any]]:
    """A stand-in that gives each model its speeds in turn."""
    left = {model: list(values) for model, values in speeds.items()}

    def time_it(run: Run) -> dict[str, Any]:
        asked.append(run)
        speed = left[run.model].pop(0)
        return {
            "runtime": "torch", "batch": run.batch, "context": run.context or 100, "prefill_seconds": 1 / speed,
            "prefill_tokens_per_second": speed, "decode_tokens_per_second": 10 * speed, "peak_memory": int(1000 * speed),
            "decode_ms": {"p50": 1 / speed}, "torch": "2", "threads": 1, "gpu": None, "cpus": 2, "device": "cpu",
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
        pytest.param({"tokens": 0}, "--batch, --context and --tokens", id="tokens"),
        pytest.param({"batch": 0}, "--batch, --context and --tokens", id="batch"),
        pytest.param({"contexts": (16, 0)}, "--batch, --context and --tokens", id="context"),
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


def test_the_default_is_what_the_model_takes_and_a_table_says_so(dsa: Path) -> None:
    done = mla2dsa("bench", dsa, "--tokens", 2, "--rounds", 1)
    assert (done.code, done.err) == (0, "")
    assert f" {1024 - 2 - WARM_UP} " in done.out
    assert "against" not in done.out
    assert "medians of 1 round\n" in done.out


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        pytest.param(("--context", "2k"), 1, ("2048 + 5 tokens exceed the 1024",), id="long"),
        pytest.param(("--context", "many"), 2, ("--context many", "4k,8k"), id="words"),
        pytest.param(("--context", "16,16"), 2, ("given twice",), id="same"),
        pytest.param(("--runtime", "onnxruntime"), 1, ("which onnxruntime cannot run",), id="runtime"),
    ],
)
def test_refusals(flags: tuple[str, ...], code: int, parts: tuple[str, ...], dsa: Path) -> None:
    assert_refused(mla2dsa("bench", dsa, "--tokens", 2, *flags), code, *parts)


class OwnNumber(int):
    """Becomes the number of the process that is given it."""

    def __reduce__(self) -> Any:
        return os.getpid, ()


class Deadly(Run):
    """Whoever is given it dies, as a process does that takes all memory."""

    def __reduce__(self) -> Any:
        return os.kill, (OwnNumber(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_line() -> None:
    with pytest.raises(UserError, match="some-model: the process that ran 7 tokens ended with exit code -9"):
        timed_apart(Deadly("some-model", 1, 7, 1))


def test_peak_memory_is_what_was_used_even_when_it_is_free_again() -> None:
    before = peak_memory()
    held = torch.ones(max(before, 2**27) // 4, dtype=torch.float32).numel()
    assert held * 4 <= peak_memory() < before + held * 4 + 2**28
