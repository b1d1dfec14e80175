"""Limits on figures of text: which are kept, which not, and what is no limit."""

import math

import pytest

from mla2dsa.errors import UsageError
from mla2dsa.optimizer.proof.evaluate import LayerRecall, TextResult
from mla2dsa.optimizer.proof.figures import Quality, Worst
from mla2dsa.optimizer.proof.limits import TEXT_GATES, Measured, foreign_checks, gated, read_gates


def measured(
    origin: str = "in", loss: float = 0.02, kl: float = 0.03, few: float = 0.0, fp8: float = 0.021
) -> Measured:
    worst = Worst(3, 10 * loss, kl, 99, 4.0, (1, 2), "odd")
    by_selection = {
        "dsa": Quality(loss, 0.0, kl, 0.9, ppl_ratio=math.exp(loss), worst=worst),
        "oracle": Quality(0.01, 0.0, 0.02, 0.9), "window": Quality(0.2, 0.0, 0.2, 0.7), "dsa-fp8": Quality(fp8, 0.0, kl, 0.9),
    }  # fmt: skip
    layers = (LayerRecall("layer0", 0.9, 1.0, 0.5, 0.2, 0.0), LayerRecall("layer1", 0.9, 1.0, 0.5, 0.2, few))
    return Measured(origin, TextResult(2.0, 10, 64, by_selection), layers)


VALUES = {
    "loss": 0.02, "ppl-ratio": math.exp(0.02), "kl": 0.03, "kl-to-oracle": 1.5, "worst-sequence": 0.2, "few-positive": 0.1,
    "fp8": 0.001,
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT_GATES)
def test_a_limit_is_kept_or_not(name: str) -> None:
    texts = [measured(few=0.1)]
    (kept,) = gated(texts, {name: VALUES[name] + 1e-9})
    (missed,) = gated(texts, {name: VALUES[name] - 1e-9})
    assert (kept.passed, missed.passed) == (True, False)
    assert kept.value == pytest.approx(VALUES[name])
    assert f"--gate {name}" in kept.name


@pytest.mark.parametrize(
    ("name", "parts"),
    [("worst-sequence", ["out", "sequence 3", "token 99", "odd"]), ("few-positive", ["layer1", "out"])],
)
def test_the_worse_text_counts_and_is_named(name: str, parts: list[str]) -> None:
    (check,) = gated([measured(few=0.01), measured("out", loss=0.03, few=0.3)], {name: 0.25})
    assert not check.passed
    assert all(part in check.detail for part in parts)


@pytest.mark.parametrize("few", [math.nan, 0.2], ids=["nan", "number"])
def test_nan_is_the_worst_of_all(few: float) -> None:
    (check,) = gated([measured(few=few), measured(few=0.1)], {"few-positive": 0.15})
    assert not check.passed
    assert check.value is few or check.value == few


@pytest.mark.parametrize(
    ("loss", "kl", "passed"), [(0.055, 0.1, [True, True]), (0.065, 0.1, [False, True]), (0.0, 0.3, [True, False])]
)
def test_foreign_text_is_held_against_the_oracle(loss: float, kl: float, passed: list[bool]) -> None:
    assert [check.passed for check in foreign_checks(measured(loss=loss, kl=kl), 0.05)] == passed


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["recall=1"], ["--gate recall=1", "no such figure", "few-positive"]),
        (["kl"], ["--gate kl", "NAME=NUMBER"]),
        (["kl=nan"], ["--gate kl=nan", "NAME=NUMBER"]),
        (["kl=1", "kl=2"], ["--gate kl=2", "twice"]),
    ],
    ids=["unknown", "no-number", "nan", "twice"],
)
def test_what_is_no_limit(given: list[str], parts: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        read_gates(given, list(TEXT_GATES))
    assert all(part in str(error.value) for part in parts)


def test_limits_are_read() -> None:
    assert read_gates(["kl=1e-2", "loss=-1"], list(TEXT_GATES)) == {"kl": 0.01, "loss": -1.0}
