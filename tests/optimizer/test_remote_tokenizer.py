"""A tokenizer with code of its own, as Kimi's: it never runs unasked, runs when allowed, and all of it travels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import save_dense
from command_line import assert_refused, mla2dsa

# The code leaves a mark, so that a test sees whether it was run.
CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizer
from .shared import OFFSET
Path({mark!r}).touch()
class TikTokenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {{"vocab_file": "tiktoken.model"}}
    def __init__(self, vocab_file=None, **options):
        super().__init__(**options)
    @property
    def vocab_size(self):
        return 256 + OFFSET
    def get_vocab(self):
        return {{chr(256 + i): i for i in range(self.vocab_size)}}
    def _tokenize(self, text, **options):
        return [chr(256 + OFFSET + byte) for byte in text.encode()]
    def _convert_token_to_id(self, token):
        return ord(token) - 256
    def _convert_id_to_token(self, index):
        return chr(256 + index)
    def convert_tokens_to_string(self, tokens):
        return bytes((ord(token) - 256 - OFFSET) % 256 for token in tokens).decode(errors="replace")
"""
TOKENIZER = ("tiktoken.model", "tokenization_kimi.py", "shared.py", "tokenizer_config.json", "chat_template.jinja")
FLAGS = ("--index-topk", 16, "--skip-verification", "--recipe")
NAME = "tokenization_kimi.TikTokenTokenizer"
REFUSAL = ("the tokenizer is code of its own", NAME, "read it, then pass --trust-remote-code")


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint in `model`; `mark` beside it appears when the code has run."""
    place = tmp_path_factory.mktemp("kimi")
    model = place / "model"
    save_dense(model, num_hidden_layers=1, first_k_dense_replace=1, vocab_size=300)
    (model / "tokenizer.json").unlink()
    settings = {
        "auto_map": {"AutoTokenizer": [NAME, None]},
        "tokenizer_class": "TikTokenTokenizer",
        "eos_token": "[EOS]",
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "tokenization_kimi.py").write_text(CODE.format(mark=str(place / "mark")))
    (model / "shared.py").write_text("OFFSET = 2\n")
    (model / "tiktoken.model").write_text("IQ== 0\n")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (place / "text.txt").write_text("def function(argument): return argument\n" * 99)
    (place / "recipe.yaml").write_text("indexer: closed-form\nsequence_length: 64\ntokens: 512\n")
    return place


@pytest.fixture(scope="module")
def converted(kimi: Path) -> Path:
    done = mla2dsa("convert", kimi / "model", kimi / "dsa", *FLAGS, kimi / "recipe.yaml")
    assert done.code == 0, done.err
    assert not (kimi / "mark").exists()
    return kimi / "dsa"


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody at the terminal who says yes to everything."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.mark.usefixtures("yes")
def test_it_does_not_run_unasked(kimi: Path, converted: Path, tmp_path: Path) -> None:
    text = kimi / "text.txt"
    for arguments in (
        ("convert", kimi / "model", tmp_path / "dsa", *FLAGS, kimi / "recipe.yaml", "--calibration", text),
        ("convert", kimi / "model", tmp_path / "dsa", *FLAGS, kimi / "recipe.yaml", "--calibration", text, "--dry-run"),
        ("verify", kimi / "model", converted, "--text", text, "--sequence-length", 64, "--skip-transformers"),
        ("generate", converted, "def main():"),
    ):
        assert_refused(mla2dsa(*arguments), 1, *REFUSAL)
    assert not (kimi / "mark").exists()
    assert list(tmp_path.iterdir()) == []


def test_it_runs_when_it_may_and_that_is_recorded(kimi: Path, converted: Path, tmp_path: Path) -> None:
    flags = ("--calibration", kimi / "text.txt", "--trust-remote-code", "--json")
    done = mla2dsa("convert", kimi / "model", tmp_path / "dsa", *FLAGS, kimi / "recipe.yaml", *flags)
    assert done.code == 0, done.err
    assert (kimi / "mark").exists()
    (kimi / "mark").unlink()
    assert done.json()["remote_code"] == [NAME]
    assert json.loads((tmp_path / "dsa" / "mla2dsa.json").read_text())["remote_code"] == [NAME]
    assert json.loads((converted / "mla2dsa.json").read_text())["remote_code"] == []
    done = mla2dsa("generate", tmp_path / "dsa", "def main():", "--max-new-tokens", 2, "--trust-remote-code")
    assert (done.code, done.err) == (0, "")
    assert (kimi / "mark").exists()
    (kimi / "mark").unlink()


def test_all_of_it_travels(kimi: Path, converted: Path, tmp_path: Path) -> None:
    folders = [converted, tmp_path / "onnx", tmp_path / "ready"]
    assert mla2dsa("export", converted, folders[1]).code == 0
    assert mla2dsa("build", folders[1], folders[2], "--onnx-only", "--sm", "90").code == 0
    for folder in folders:
        for name in TOKENIZER:
            assert (folder / name).read_bytes() == (kimi / "model" / name).read_bytes()
    assert not (kimi / "mark").exists()


def test_code_that_lies_elsewhere_is_named(kimi: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(kimi / "model", tmp_path / "model"))
    elsewhere = f"moonshotai/Kimi-K2--{NAME}"
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [elsewhere, None]}}))
    done = mla2dsa("convert", model, tmp_path / "dsa", *FLAGS, kimi / "recipe.yaml", "--calibration", kimi / "text.txt")
    assert_refused(done, 1, elsewhere, "--trust-remote-code")
