"""Text from every runtime ends where transformers ends it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import small_conversion
from fake_tensorrt import FakeEngine
from manifests import engine_manifest, runnable
from places import TINY

from mla2dsa.files.manifests.engine_manifest import ENGINE_MANIFEST
from mla2dsa.files.manifests.export_manifest import EXPORT_MANIFEST
from mla2dsa.optimizer.export import export
from mla2dsa.optimizer.generate import generate_text
from mla2dsa.runtime.generation import Sampling
from mla2dsa.runtime.tensorrt_session import TensorRtSession

PROMPT, MOST = "def main():\n    return", 24
PROFILE = {"batch": [1, 1, 1], "cache_length": [16, 64, 256]}
PROFILES = [{"name": "prefill", "seq": [1, 32, 32], **PROFILE}, {"name": "decode", "seq": [1, 1, 1], **PROFILE}]


def transformers_ids(folder: Path, prompt: str = PROMPT, **options: Any) -> list[int]:
    """What transformers itself generates, without the token that ends it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"]
    made: list[int] = model.generate(ids, max_new_tokens=MOST, do_sample=False, **options)[0, ids.shape[1] :].tolist()
    return made


@pytest.fixture(scope="module")
def second_end(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A DSA checkpoint with two ends, the second met after a few tokens; and the text that comes before it."""
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(small_conversion(tmp_path_factory), tmp_path_factory.mktemp("ends") / "dsa"))
    full = transformers_ids(folder, eos_token_id=None)
    stop = next(token for token in full[4:] if token not in full[:4])
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [0, stop]}))
    made = transformers_ids(folder)
    assert made[-1] == stop
    assert 4 < len(made) < MOST
    return folder, AutoTokenizer.from_pretrained(folder).decode(made[:-1])


@pytest.fixture(scope="module")
def exported(second_end: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(second_end[0], tmp_path_factory.mktemp("onnx") / "tiny", max_seq=256).folder


def text(folder: Path) -> str:
    return "".join(generate_text(str(folder), PROMPT, None, MOST, Sampling()))


def test_torch(second_end: tuple[Path, str]) -> None:
    assert text(second_end[0]) == second_end[1]


def test_onnxruntime(second_end: tuple[Path, str], exported: Path) -> None:
    assert text(exported) == second_end[1]


def test_the_manifest_says_it_too(second_end: tuple[Path, str], exported: Path, tmp_path: Path) -> None:
    """Engines and exports are run by programs that read nothing else."""
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    (folder / "generation_config.json").unlink()
    assert text(folder) == second_end[1]
    assert len(json.loads((folder / EXPORT_MANIFEST).read_text())["model"]["eos_token_id"]) == 2


def test_tensorrt(
    second_end: tuple[Path, str], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "engine"))
    (folder / "generation_config.json").unlink()
    exports = json.loads((folder / EXPORT_MANIFEST).read_text())
    shared = {name: exports[name] for name in runnable()}
    for name in ("model.engine", "libmla2dsa_trt.so"):
        (folder / name).write_bytes(b"of no matter here")
    manifest = {**engine_manifest(folder, "tensorrt", "10.16.1", [90]), **shared, "profiles": PROFILES}
    (folder / EXPORT_MANIFEST).unlink()
    (folder / ENGINE_MANIFEST).write_text(json.dumps(manifest))
    session = TensorRtSession(FakeEngine(folder, manifest), manifest, batch=1, device="cpu")
    monkeypatch.setattr("mla2dsa.runtime.tensorrt_session.open_engine_session", lambda folder, batch: session)
    assert text(folder) == second_end[1]


@pytest.mark.parametrize("prompt", [PROMPT, "import os\n"], ids=["def", "import"])
def test_a_dense_checkpoint_says_what_transformers_says(prompt: str) -> None:
    """The captured graph with caches, its attention as it is: greedy text is the same, token by token."""
    from transformers import AutoTokenizer

    made = transformers_ids(TINY, prompt)
    expected = AutoTokenizer.from_pretrained(TINY).decode(made)
    assert len(made) == MOST
    assert "".join(generate_text(str(TINY), prompt, None, MOST, Sampling())) == expected


def test_without_the_second_end_it_goes_on(second_end: tuple[Path, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(second_end[0], tmp_path / "dsa"))
    (folder / "generation_config.json").unlink()
    assert text(folder).startswith(second_end[1])
    assert len(text(folder)) > len(second_end[1])
