"""The TensorRT session on a stand-in for TensorRT's runtime (no GPU here): bindings, profiles, caches, the same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import small_conversion
from fake_tensorrt import FakeEngine

from mla2dsa.errors import UserError
from mla2dsa.files.manifests.export_manifest import EXPORT_MANIFEST
from mla2dsa.optimizer.export import export
from mla2dsa.runtime import generation
from mla2dsa.runtime.generation import Sampling, Session, generate
from mla2dsa.runtime.ort_session import OrtSession
from mla2dsa.runtime.tensorrt_session import TensorRtSession

PREFILL: dict[str, Any] = {"name": "prefill", "batch": [1, 1, 3], "seq": [1, 32, 32], "cache_length": [16, 64, 256]}
DECODE: dict[str, Any] = {**PREFILL, "name": "decode", "seq": [1, 1, 1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = small_conversion(tmp_path_factory)
    return export(checkpoint, tmp_path_factory.mktemp("onnx") / "tiny", max_batch=3, max_seq=256).folder


def manifest(folder: Path, *profiles: dict[str, Any]) -> dict[str, Any]:
    return {**json.loads((folder / EXPORT_MANIFEST).read_text()), "profiles": list(profiles or (PREFILL, DECODE))}


def opened(
    folder: Path, batch: int = 1, *profiles: dict[str, Any], **options: Any
) -> tuple[TensorRtSession, FakeEngine]:
    known = manifest(folder, *profiles)
    engine = FakeEngine(folder, known)
    return TensorRtSession(engine, known, batch, device="cpu", **options), engine


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(1, 1024, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def texts(session: Session, prompts: list[list[int]], count: int) -> list[list[int | None]]:
    steps = list(generate(session, prompts, count, Sampling()))
    return [[step[row] for step in steps] for row in range(len(prompts))]


def test_the_same_text_as_onnxruntime(folder: Path) -> None:
    """Prefill in parts of 32, then decode, while the caches grow from 16 slots to 256."""
    session, engine = opened(folder, first=16)
    assert texts(session, [prompt(70, 0)], 100) == texts(OrtSession(folder, batch=1, threads=1), [prompt(70, 0)], 100)
    (context,) = engine.contexts
    assert context.profiles == [0, 1]
    assert context.runs == 3 + 99


def test_a_ragged_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 48)  # more than a profile takes: fed in parts
    prompts = [prompt(size, size) for size in (60, 3, 33)]
    want = texts(OrtSession(folder, batch=3, threads=1), prompts, 8)
    assert texts(opened(folder, 3)[0], prompts, 8) == want


def test_a_cache_is_never_shorter_than_the_profile_wants(folder: Path) -> None:
    long: tuple[dict[str, Any], ...] = tuple(
        {**profile, "cache_length": [128, 128, 256]} for profile in (PREFILL, DECODE)
    )
    session, _ = opened(folder, 1, *long, first=16)
    assert texts(session, [prompt(5, 0)], 4) == texts(OrtSession(folder, batch=1, threads=1), [prompt(5, 0)], 4)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (4, {}, "batch 4 is over the 3 this engine was built for"),
        (1, {"capacity": 257}, "a cache of 257 tokens is over the 256 this engine was built for"),
    ],
    ids=["batch", "capacity"],
)
def test_limits(folder: Path, batch: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(folder, batch, **options)


def test_no_profile_fits(folder: Path) -> None:
    session, _ = opened(folder, 1, {**PREFILL, "batch": [2, 2, 3]}, {**DECODE, "batch": [2, 2, 3]})
    with pytest.raises(UserError, match=r"no profile of the engine takes batch 1, 5 tokens .* prefill batch 2..3"):
        texts(session, [prompt(5, 0)], 1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("execute_async_v3", "the engine failed to run"),
        ("set_tensor_address", "the engine has no tensor"),
        ("set_input_shape", "TensorRT refuses the shape"),
        ("set_optimization_profile_async", "does not change to profile"),
    ],
)
def test_what_tensorrt_refuses(folder: Path, method: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session, engine = opened(folder)
    monkeypatch.setattr(engine.contexts[0], method, lambda *_: False)
    with pytest.raises(UserError, match=message):
        texts(session, [prompt(5, 0)], 1)


def test_no_context(folder: Path) -> None:
    known = manifest(folder)
    engine = FakeEngine(folder, known)
    engine.create_execution_context = lambda: None  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(UserError, match="creates no execution context"):
        TensorRtSession(engine, known, 1, device="cpu")
