"""examples/deploy/run_engine: chunks, slots and caches of a sequence, with a stand-in for TensorRT that has one small model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from places import NATIVE, ROOT

from mla2dsa.kernels.native_build import BuildError, compiler

VOCAB = 97
LOGITS = {"float32": "0", "float16": "1", "bfloat16": "7"}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        command = [compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    except BuildError as error:
        pytest.skip(str(error))
    built = tmp_path_factory.mktemp("run_engine") / "run_engine"
    source = ROOT / "examples" / "deploy" / "run_engine.cpp"
    command += [str(source), "-I", str(NATIVE / "fake_runtime"), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.engine").write_text(LOGITS["float32"])
    (tmp_path / "libmla2dsa_trt.so").touch()
    return with_stop_tokens(tmp_path, [])


def with_stop_tokens(folder: Path, ids: object) -> Path:
    """The manifest, as `build` writes it, with these ids."""
    model = {"vocab_size": VOCAB, "eos_token_id": ids, "context": 16}
    (folder / "mla2dsa-engine.json").write_text(json.dumps({"format": 1, "model": model}, indent=2))
    return folder


def run(program: Path, *words: str | int | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, timeout=600, env={})


def expected(prompt: list[int], count: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(count):
        sequence.append((sum(sequence) + len(sequence)) % VOCAB)
    return sequence[len(prompt) :]


@pytest.mark.parametrize(
    "prompt", [[5], [5, 9], [1, 2, 3, 4], [1, 2, 3, 4, 5], [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]]
)
def test_prompts_of_any_length(program: Path, folder: Path, prompt: list[int]) -> None:
    """Whole chunks, a last chunk below the profile's minimum, a single token."""
    done = run(program, folder, 6, *prompt)
    assert (done.returncode, done.stderr) == (0, "")
    assert [int(word) for word in done.stdout.split()] == expected(prompt, 6)


@pytest.mark.parametrize("dtype", LOGITS)
def test_types_of_logits(program: Path, folder: Path, dtype: str) -> None:
    (folder / "model.engine").write_text(LOGITS[dtype])
    assert [int(word) for word in run(program, folder, 4, 7, 8, 9).stdout.split()] == expected([7, 8, 9], 4)


def test_the_cache_is_used_to_its_last_slot(program: Path, folder: Path) -> None:
    assert len(run(program, folder, 15, 1, 2).stdout.split()) == 15
    refused(run(program, folder, 16, 1, 2), "17 tokens, the engine's caches hold 16")


@pytest.mark.parametrize("place", [0, 1, 5], ids=lambda place: f"token-{place}")
@pytest.mark.parametrize("others", [[], [VOCAB, VOCAB + 1]], ids=["one-id", "several-ids"])
def test_it_stops_before_a_token_that_ends_the_text(program: Path, folder: Path, place: int, others: list[int]) -> None:
    text = expected([5, 9], 8)
    assert text.index(text[place]) == place
    with_stop_tokens(folder, [*others, text[place]])
    done = run(program, folder, 8, 5, 9)
    assert (done.returncode, done.stderr) == (0, "")
    assert [int(word) for word in done.stdout.split()] == text[:place]


@pytest.mark.parametrize("ids", [None, 3, ["3"], [-1], "[3]"], ids=str)
def test_stop_tokens_that_are_none(program: Path, folder: Path, ids: object) -> None:
    with_stop_tokens(folder, ids)
    refused(
        run(program, folder, 1, 1),
        f"{folder}/mla2dsa-engine.json: eos_token_id is no list of token ids; build the engine again",
    )


def test_a_folder_without_a_manifest(program: Path, folder: Path) -> None:
    (folder / "mla2dsa-engine.json").unlink()
    refused(run(program, folder, 1, 1), f"{folder}/mla2dsa-engine.json: cannot be read")


def test_a_plan_with_the_library_inside(program: Path, folder: Path) -> None:
    (folder / "libmla2dsa_trt.so").unlink()
    refused(run(program, folder, 1, 1), f"{folder}/libmla2dsa_trt.so: TensorRT cannot load it")
    assert [int(word) for word in run(program, "--host-code", folder, 1, 1).stdout.split()] == expected([1], 1)


def test_what_is_wrong_is_said(program: Path, folder: Path) -> None:
    refused(run(program), "usage: run_engine [--host-code] ENGINE_FOLDER NEW_TOKENS ID...")
    refused(run(program, folder, 0, 1), "0 is not a whole number of at least 1")
    refused(run(program, folder, 1, "a"), "a is not a whole number of at least 0")
    refused(run(program, folder / "none", 1, 1), f"{folder}/none/model.engine: cannot be read")
    (folder / "model.engine").write_text("no plan")
    refused(run(program, folder, 1, 1), f"{folder}/model.engine: TensorRT cannot use it on this machine")
    (folder / "model.engine").write_text("2")
    refused(run(program, folder, 1, 1), "the logits are not float32, float16 or bfloat16")


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"run_engine: {message}"
