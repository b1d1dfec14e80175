"""benchmarks/gpu.py proves itself on a CPU: the same checks and the same timing code, at small shapes in the interpreter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytest.importorskip("triton", reason="Triton is for x86-64 Linux")


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """From a copy in a folder of another name, away from the repository, as on a machine where nothing is installed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "benchmarks" / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for part in ("benchmarks", "kernels"):
        shutil.copytree(ROOT / part, tmp_path / "clone.x" / part)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path / "clone.x")
    return tmp_path / "clone.x"


def test_tiny_run(copy: Path, tmp_path: Path) -> None:
    done = run(copy, "--tiny", "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all(check["passed"] for check in found["checks"])
    ops = {row["op"] for row in found["rows"]}
    assert ops == {"indexer scores", "top-k", "sparse_mla", "sparse_mla_fp8", "layer, bf16", "layer, fp8 indexer"}


def test_a_failed_check_is_an_exit_code(copy: Path) -> None:
    """A combine kernel that forgets one split: the checks have to see it."""
    file = copy / "kernels" / "gpu" / "triton_code" / "combine_kernel.py"
    broken = file.read_text().replace("part < splits", "part < splits - 1")
    assert broken != file.read_text()
    file.write_text(broken)
    done = run(copy, "--tiny", "--only", "topk")
    assert done.returncode == 1, done.stderr
    assert "FAILED: sparse_mla, 1 queries" in done.stdout
