"""A small part of `benchmarks/fuzz.py`: damaged files of every kind are refused in one short line, or do no harm."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from fuzz_kinds import kinds, load_libraries, make
from fuzzing import Ended, Kind, fault, fuzz

COUNT, SEED = 8, 3  # of each kind
NAMES = (
    "header", "index", "config", "checkpoint manifest", "export manifest", "recipe", "onnx", "onnx, forged digest", "pt2",
    "pt2, forged digest", "engine manifest",
)  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    load_libraries()
    return kinds(make(tmp_path_factory.mktemp("fuzz"), engine=find_spec("tensorrt_rtx") is not None))


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(name: str, known: dict[str, Kind], tmp_path: Path) -> None:
    if name not in known:
        pytest.skip("needs tensorrt-rtx")
    found = fuzz(known[name], COUNT, SEED, tmp_path)
    assert len(found) == COUNT
    faults = [f"{' '.join(command)}: {wrong}" for wrong, _, command in found if wrong is not None]
    assert not faults


@pytest.mark.parametrize(
    ("ended", "part"),
    [
        (Ended(1, "", "mla2dsa: a: b\n", 0, 0), None),
        (Ended(0, "text", "", 0, 0), None),
        (Ended(0, "other", "", 0, 0), "another result"),
        (Ended(None, "", "", 10, 0), "hangs"),
        (Ended(-11, "", "", 0, 0), "exit code -11"),
        (Ended(1, "", "mla2dsa: internal error: KeyError\n", 0, 0), "internal error"),
        (Ended(1, "", "Traceback (most recent call last):\n", 0, 0), "internal error"),
        (Ended(1, "", "warning\nmla2dsa: a\n", 0, 0), "2 lines"),
        (Ended(1, "", "", 0, 0), "0 lines"),
        (Ended(1, "", "mla2dsa: " + "x" * 400, 0, 0), "a line of 409 characters"),
        (Ended(1, "", "mla2dsa: \x1b[2J", 0, 0), "prints what it should not"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_faults_are_seen(ended: Ended, part: str | None) -> None:
    found = fault(ended, "text")
    assert (found is None) == (part is None)
    assert part is None or part in str(found)
