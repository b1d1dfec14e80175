"""examples/tiny-mla: the split rule, the corpus and training scripts, the held-out sample, the loss of the weights."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from places import TINY

CONTEXT = 1024


def load_corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_mla_corpus", TINY / "corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corpus = load_corpus()
HELD_OUT_FILES = sorted((TINY / "held_out").glob("*.py.txt"))


def run_script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """One thread, as in the tests: two workers' threads in each other's way make training many times slower."""
    command = [sys.executable, str(TINY / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def library_path(sample: Path) -> str:
    """held_out/asyncio.proactor_events.py.txt -> asyncio/proactor_events.py"""
    return sample.name.removesuffix(".py.txt").replace(".", "/") + ".py"


def write_library(lib: Path, paths: list[str], text: str = "x = 1\n" * 400) -> Path:
    for path in paths:
        (lib / path).parent.mkdir(parents=True, exist_ok=True)
        (lib / path).write_text(text)
    return lib


# The split rule


@pytest.mark.parametrize(
    ("path", "held_out"),
    [
        ("gzip.py", True),
        ("re/_parser.py", True),
        ("xml/dom/minidom.py", True),
        ("json/decoder.py", False),
        ("argparse.py", False),
    ],
)
def test_split_rule_is_frozen(path: str, held_out: bool) -> None:
    """Another rule would put training text into the held-out sample."""
    assert corpus.is_held_out(path) is held_out


def test_splits_divide_the_library() -> None:
    train, held_out = (corpus.corpus_paths(corpus.stdlib(), split) for split in corpus.SPLITS)
    assert not set(train) & set(held_out)
    assert len(train) > 8 * len(held_out) > 80
    assert not any(corpus.is_held_out(path) for path in train)
    assert all(corpus.is_held_out(path) for path in held_out)


def test_skips_look_at_the_library_only(tmp_path: Path) -> None:
    """A library that itself lies below a folder called test is not skipped; its own test folder is."""
    lib = write_library(tmp_path / "test" / "lib", ["argparse.py", "test/support.py", "encodings/ascii.py"])
    write_library(lib, ["small.py"], text="x = 1\n")
    assert corpus.corpus_paths(lib, "train") == ["argparse.py"]


def test_join_documents_cuts_at_a_character() -> None:
    text = corpus.join_documents(["é" * 10, "b"], max_bytes=len(corpus.EOT) + 3)
    assert text == corpus.EOT + "é"


# The corpus script


def test_corpus_script_writes_the_training_split(tmp_path: Path) -> None:
    first, again, other = tmp_path / "new" / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"
    for out, seed in [(first, 0), (again, 0), (other, 1)]:
        done = run_script("corpus.py", "--split", "train", "--out", out, "--max-bytes", "200000", "--seed", str(seed))
        assert done.returncode == 0, done.stderr
    assert 199_990 < first.stat().st_size <= 200_000
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    documents = first.read_text().split(corpus.EOT)
    sources = {*corpus.read_documents(corpus.stdlib(), "train")}
    assert documents[0] == ""
    assert set(documents[1:-1]) <= sources
    assert any(source.startswith(documents[-1]) for source in sources)


def test_corpus_script_writes_the_held_out_split(tmp_path: Path) -> None:
    assert run_script("corpus.py", "--split", "held-out", "--out", tmp_path / "a.txt").returncode == 0
    documents = (tmp_path / "a.txt").read_text().split(corpus.EOT)[1:]
    assert sorted(documents) == sorted(corpus.read_documents(corpus.stdlib(), "held-out"))


def test_corpus_script_refuses_an_unknown_split(tmp_path: Path) -> None:
    done = run_script("corpus.py", "--split", "valid", "--out", tmp_path / "a.txt")
    assert done.returncode == 2
    assert "--split" in done.stderr
    assert not (tmp_path / "a.txt").exists()


# The training script


@pytest.fixture(scope="module")
def small_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training files and two held-out files, enough for a held-out row of 2048 tokens."""
    lib = tmp_path_factory.mktemp("lib")
    for split, count in [("train", 6), ("held-out", 2)]:
        paths = corpus.corpus_paths(corpus.stdlib(), split)
        middling = sorted(paths, key=lambda path: (corpus.stdlib() / path).stat().st_size)[len(paths) // 2 :][:count]
        for path in middling:
            write_library(lib, [path], (corpus.stdlib() / path).read_text(errors="replace"))
    return lib


def test_training_script_trains(small_library: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = run_script("train.py", "--lib", small_library, "--out", out, "--stages", "64x4x8,320x1x1", "--lr", "0.05")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((out / "training.json").read_text())
    assert report["steps"] == 9
    assert report["tokens"] == 64 * 4 * 8 + 320
    assert report["held_nats_1024"] < 0.95 * math.log(1024), "no better than guessing"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert model.dtype == torch.bfloat16
    trained, committed = (json.loads((folder / "config.json").read_text()) for folder in (out, TINY))
    assert trained | {"transformers_version": committed["transformers_version"]} == committed
    assert AutoTokenizer.from_pretrained(out)(corpus.EOT).input_ids == [0]


def test_training_script_continues_from_a_checkpoint(small_library: Path, tmp_path: Path) -> None:
    arguments = ("--lib", small_library, "--init", TINY, "--out", tmp_path, "--stages", "64x1x1", "--lr", "1e-6")
    done = run_script("train.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "training.json").read_text())["held_nats_1024"] < 3.0
    assert (tmp_path / "tokenizer.json").read_text() == (TINY / "tokenizer.json").read_text()


# The held-out sample and the weights


@pytest.fixture(scope="module")
def held_out_tokens() -> torch.Tensor:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    ids: Iterator[int] = (
        token
        for file in HELD_OUT_FILES
        for token in tokenizer.encode(corpus.EOT + file.read_text(encoding="utf-8")).ids
    )
    return torch.tensor(list(ids))


@pytest.mark.parametrize("sample", HELD_OUT_FILES, ids=lambda file: file.name)
def test_sample_was_not_trained_on(sample: Path) -> None:
    assert corpus.is_held_out(library_path(sample))
    assert library_path(sample) in (TINY / "held_out" / "README.md").read_text()


def test_sample_is_long_and_licensed(held_out_tokens: torch.Tensor) -> None:
    assert len(held_out_tokens) >= 24 * CONTEXT
    licence = (TINY / "held_out" / "LICENSE-PSF").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence


def test_checkpoint_predicts_the_sample(held_out_tokens: torch.Tensor) -> None:
    """Every tenth sequence of the sample; the model card says 2.26 for all of them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rows = held_out_tokens[: len(held_out_tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)[::10]
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    assert sum(losses) / len(losses) < 2.35


def test_card_quotes_the_record() -> None:
    card, record = (TINY / "README.md").read_text(), json.loads((TINY / "training.json").read_text())
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\n")
    assert f"**{record['held_nats_1024']:.3f} nats/token**" in card
    assert f"{record['held_nats_2048']:.3f} nats/token" in card
    bits = record["held_nats_1024"] / math.log(2) / record["bytes_per_token"]
    assert f"{bits:.2f} bits/byte" in card
