"""plan --cost: tables, JSON, and what it does not take."""

from __future__ import annotations

import pytest
from command_line import TINY, assert_refused, mla2dsa, quick_capture  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("quick_capture")


def test_plan_says_what_serving_costs() -> None:
    done = mla2dsa("plan", TINY, "--index-topk", 64, "--cost", "--gpu", "h200", "--price", 3)
    assert (done.code, done.err) == (0, "")
    for part in (
        "cost on H200 SXM at $3 an hour",
        "a roofline, not measured",
        "cache of one token, all layers: dense 640 bytes",
    ):
        assert part in done.out


def test_the_json_has_the_same() -> None:
    plain = mla2dsa("plan", TINY, "--index-topk", 64, "--json").json()
    done = mla2dsa("plan", TINY, "--index-topk", 64, "--cost", "--batch", 4, "--speculative", "--json").json()
    cost = done.pop("cost")
    assert done.keys() == plain.keys()
    assert (cost["gpu"]["key"], cost["batch"], cost["speculative"], cost["dollars_per_gpu_hour"]) == (
        "h100",
        4,
        True,
        2.0,
    )
    assert [row["position"] for row in cost["dollars_per_million_tokens"]] == [1024]
    assert cost["weight_bytes"] > cost["active_parameters"] > 1e6  # bf16, or more, and all of them at once


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--gpu", "h100"), "--gpu goes with --cost"),
        (("--batch", 4), "--batch goes with --cost"),
        (("--cost", "--gpu", "tpu"), "--gpu tpu: expected one of a100"),
        (("--cost", "--price", 0), "--price 0.0: expected dollars"),
        (("--cost", "--price", "nan"), "--price nan: expected dollars"),
        (("--cost", "--batch", 0), "--batch 0: expected 1 or more"),
    ],
    ids=str,
)
def test_what_it_does_not_take(flags: tuple[object, ...], part: str) -> None:
    assert_refused(mla2dsa("plan", TINY, *flags), 2, part)
