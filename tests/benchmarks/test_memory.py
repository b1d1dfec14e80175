"""benchmarks/memory.py on a model of middling size: a conversion keeps within what its plan says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from places import ROOT

OPTIONS = [
    "--heads",
    "16",
    "--layers",
    "2",
    "--context",
    "2048",
    "--index-topk",
    "256",
    "--tokens",
    "4096",
    "--verify",
    "1",
    "--json",
]


@pytest.mark.skipif(not os.environ.get("MLA2DSA_SLOW_TESTS"), reason="takes minutes: make test-slow")
@pytest.mark.parametrize("length", [512, 2048])
def test_a_conversion_keeps_within_its_predicted_memory(length: int) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), *OPTIONS, "--sequence-length", str(length)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    whole = (
        found["exit"] == 0 or "KL to the dense model" in found["said"][-1]
    )  # what is last measured of a random model
    assert whole, found["said"]
    assert found["sequence_length"] == length
    assert found["measured_peak"] <= 1.2 * found["peak_memory"]
    assert found["peak_memory"] <= 1.5 * found["measured_peak"]  # a prediction, no safe guess
