"""Conversions by several processes, as torchrun starts them: the same result as by one, and one end for all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import contents
from command_line import (
    INDEXER_SHARD,
    LAYERS,
    TINY,
    Done,
    finished,
    mla2dsa,
    quick_capture,  # noqa: F401  (a fixture)
    training_text,
)
from places import ROOT

pytestmark = pytest.mark.usefixtures("quick_capture")

# Seven calibrate and one proves: some processes have one more than others, and one has nothing to prove.
RECIPE = "sequence_length: 96\ntokens: 672\nrows: 24\nverify: {sequences: 1, max_loss_delta: 1}\ndistil: {steps: 9}\n"


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(RECIPE)
    text = training_text(tmp_path_factory)
    return ["--recipe", file, "--index-topk", 32, "--calibration", text, "--skip-transformers", "--json"]


def together(count: int, *command: object) -> Done:
    """`torchrun --nproc-per-node COUNT COMMAND`."""
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*torchrun, *map(str, command)], env=environment, capture_output=True, text=True, timeout=240)
    return finished(done.returncode, done.stdout, done.stderr)


def ours(done: Done) -> list[str]:
    """What the processes of a conversion say on stderr: torchrun reports what failed, too."""
    return [line for line in done.err.splitlines() if line.startswith(("mla2dsa: ", "model.layers."))]


def without_time(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name != "seconds"}


def assert_same(one: Path, many: Path) -> None:
    assert contents(many)[INDEXER_SHARD] == contents(one)[INDEXER_SHARD]
    assert sorted(contents(many)) == sorted(contents(one))
    reports = [json.loads((folder / "report.json").read_text()) for folder in (one, many)]
    assert without_time(reports[0]) == without_time(reports[1])


def test_closed_form_of_two_is_that_of_one(flags: list[object], tmp_path: Path) -> None:
    flags = [*flags, "--indexer", "closed-form", "--skip-verification"]
    one = mla2dsa("convert", TINY, tmp_path / "one", *flags)
    two = together(2, "-m", "mla2dsa", "convert", TINY, tmp_path / "two", *flags)
    assert (one.code, two.code) == (0, 0), one.err + two.err
    assert_same(tmp_path / "one", tmp_path / "two")
    assert without_time(two.json()) == without_time(one.json())
    assert ours(two) == one.err.splitlines()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_one_fails_and_all_end_and_go_on_later(flags: list[object], tmp_path: Path) -> None:
    """The second process fails at the last layer, when the first two are kept."""
    flags = [*flags, "--indexer", "distil"]
    script = ROOT / "tests" / "helpers" / "failing_process.py"
    failed = together(2, script, 1, LAYERS[3], "convert", TINY, tmp_path / "two", *flags)
    assert failed.code != 0
    assert ours(failed)[-1] == f"mla2dsa: process 1: {LAYERS[3]}: does not converge"
    assert [line.partition(":")[0] for line in ours(failed)[:-1]] == list(LAYERS[:2])
    assert failed.out == ""
    assert re.findall(r"exitcode +: (-?\d+)", failed.err) == ["1", "1"]
    assert [path.name for path in tmp_path.iterdir()] == [".two.mla2dsa-layers"]
    resumed = together(2, "-m", "mla2dsa", "convert", TINY, tmp_path / "two", *flags, "--resume")
    assert resumed.code == 0, resumed.err
    assert [line.endswith("kept from before") for line in ours(resumed)] == [True, True, False, False]
    assert mla2dsa("convert", TINY, tmp_path / "one", *flags).code == 0
    assert_same(tmp_path / "one", tmp_path / "two")


def test_two_choose_the_layers_that_share_as_one_does(flags: list[object], tmp_path: Path) -> None:
    file = tmp_path / "share.yaml"
    file.write_text(Path(str(flags[1])).read_text() + "share: auto\nshare_loss: 0.5\n")
    flags = ["--recipe", file, *flags[2:], "--indexer", "closed-form", "--skip-verification"]
    one = mla2dsa("convert", TINY, tmp_path / "one", *flags)
    two = together(2, "-m", "mla2dsa", "convert", TINY, tmp_path / "two", *flags)
    assert (one.code, two.code) == (0, 0), one.err + two.err
    assert one.json()["sharing"]["shared"]
    assert_same(tmp_path / "one", tmp_path / "two")
