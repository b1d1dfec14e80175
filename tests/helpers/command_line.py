"""The command line called in this process, and one small conversion of the example model that many tests share."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import saved
import torch
from places import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla2dsa.cli import main

INDEXER_SHARD = "model-indexer.safetensors"
LAYERS = tuple(f"model.layers.{layer}.self_attn" for layer in range(4))
SMALL_RECIPE = "indexer: closed-form\nsequence_length: 192\ntokens: 2304\nrows: 64\nverify: {sequences: 2}\n"
SMALL_TOPK = 32
_MADE: dict[object, Path] = {}


@pytest.fixture
def quick_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is captured once per session: most of a short command's time is spent there."""
    for module in ("plan", "proof.pair"):
        monkeypatch.setattr(f"mla2dsa.optimizer.{module}.capture", saved.captured)


@pytest.fixture(scope="module")
def captured_once() -> Iterator[None]:
    """`quick_capture` for a whole file, and for sessions and exports too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("plan", "proof.pair", "model.cached_model"):
            patch.setattr(f"mla2dsa.optimizer.{module}.capture", saved.captured)
        yield


@dataclass(frozen=True)
class Done:
    """What one call left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str
    raw_err: str = ""  # as it was; in err, errors of --json are lines

    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


def mla2dsa(*arguments: object) -> Done:
    """`mla2dsa ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return finished(code, out.getvalue(), err.getvalue())


def finished(code: int, out: str, err: str) -> Done:
    """What a call left, errors of --json as lines."""
    return Done(code, out, "".join(map(_as_line, err.splitlines(keepends=True))), err)


def _as_line(line: str) -> str:
    """With --json an error is an object: the line that it would be without."""
    return f"mla2dsa: {json.loads(line)['error']}\n" if line.startswith('{"error": ') else line


def assert_refused(done: Done, code: int, *parts: object) -> None:
    """Nothing on stdout, one line on stderr that names all `parts`, and the exit code."""
    lines = [line for line in done.err.splitlines() if ": captures " not in line]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("mla2dsa: ")
    assert "internal error" not in lines[0]
    for part in parts:
        assert str(part) in lines[0]
    assert done.code == code
    assert done.out == ""


def training_text(factory: pytest.TempPathFactory, size: int = 60_000) -> Path:
    """The first bytes of the example's training split: only read it."""
    if size not in _MADE:
        file = factory.mktemp("text") / "train.txt"
        script = [sys.executable, TINY / "corpus.py", "--split", "train", "--max-bytes", str(size), "--out", file]
        subprocess.run(script, check=True, capture_output=True)
        _MADE[size] = file
    return _MADE[size]


def small_flags(factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Flags of a conversion that takes a few seconds: 12 sequences of 192 tokens, index_topk 32."""
    if "recipe" not in _MADE:
        file = factory.mktemp("recipe") / "small.yaml"
        file.write_text(SMALL_RECIPE)
        _MADE["recipe"] = file
    return ("--recipe", _MADE["recipe"], "--index-topk", SMALL_TOPK, "--calibration", training_text(factory))


def small_conversion(factory: pytest.TempPathFactory) -> Path:
    """The example model converted and verified with `small_flags`, once per session: only read it."""
    if "small" not in _MADE:
        out = factory.mktemp("small") / "dsa"
        done = mla2dsa("convert", TINY, out, *small_flags(factory), "--json")
        assert done.code == 0, done.err
        (out.parent / "stdout.json").write_text(done.out)
        (out.parent / "stderr.txt").write_text(done.err)
        _MADE["small"] = out
    return _MADE["small"]


def with_indexers(folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """Put `change(name, tensor)` in place of every indexer tensor of the copy in `folder`."""
    file = folder / INDEXER_SHARD
    changed = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    return folder


def randomised(name: str, tensor: Tensor) -> Tensor:
    """An untrained indexer: projections drawn anew, k_norm as it is."""
    generator = torch.Generator().manual_seed(len(name) + tensor.numel())
    return tensor if "k_norm" in name else (torch.randn(tensor.shape, generator=generator) * 0.02).to(tensor.dtype)


def start(*arguments: object) -> subprocess.Popen[str]:
    """`mla2dsa ARGUMENTS` in a process of its own, one thread, with Python's own answer to Ctrl-C."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "mla2dsa", *map(str, arguments)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def stop_when(process: subprocess.Popen[str], seen: Callable[[], bool], number: signal.Signals) -> Done:
    """Send the signal as soon as `seen()` holds; fails if the process ends before."""
    limit = time.monotonic() + 600
    while not seen():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "nothing was seen within ten minutes"
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    return Done(process.returncode, out, err)
