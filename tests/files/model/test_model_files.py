"""Which files of a folder belong to the model: tokenizers of every kind are whole, nothing else comes along."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import assert_one_line

from mla2dsa.errors import UserError
from mla2dsa.files.model.model_files import TOKENIZER_FILES, left_out, model_files, remote_tokenizer

KIMI = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}, "eos_token": "[EOS]"}
FOREIGN = {
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    "AutoConfig": "configuration_deepseek.Config",
}
STRAY = ["README.md", "train.py", "modeling_deepseek.py", "configuration_deepseek.py", ".gitattributes", "logo.png"]

# What lies in the folder beside STRAY, and all of it belongs to the model.
FOLDERS: dict[str, dict[str, str]] = {
    "fast": {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "special_tokens_map.json": "{}"},
    "byte-pair": {"vocab.json": "{}", "merges.txt": "", "added_tokens.json": "{}", "generation_config.json": "{}"},
    "sentencepiece": {"tokenizer.model": "m", "tokenizer_config.json": "{}", "LICENSE": "l", "NOTICE.txt": "n"},
    "templates": {
        "chat_template.jinja": "{{ x }}", "additional_chat_templates/tool_use.jinja": "{{ y }}", "LICENSE-MODEL": "l",
        "tokenizer.model.v3": "m",
    },
    "kimi": {
        "tokenizer_config.json": json.dumps(KIMI), "tiktoken.model": "IQ== 0\n",
        "tokenization_kimi.py": 'class T:\n    vocab_files_names = {"vocab_file": "tiktoken.model"}\n',
    },
    "name-in-a-constant": {
        "tokenizer_config.json": json.dumps(KIMI), "words.bpe": "w", "extra.model": "e",
        "tokenization_kimi.py": 'FILES = {"a": "words.bpe"}\nclass T:\n    vocab_files_names = FILES | {"b": "extra.model"}\n',
    },
    "imports-its-neighbours": {
        "tokenizer_config.json": json.dumps(KIMI), "shared.py": "from . import deeper\n", "deeper.py": 'F = "deep.txt"\n',
        "tokenization_kimi.py": "from .shared import x\n", "deep.txt": "d",
    },
    "named-in-the-config": {"tokenizer_config.json": '{"vocab_file": "qwen.words"}', "qwen.words": "w", "qwen.tiktoken": "t"},
    "code-from-config-json": {
        "config.json": json.dumps({"auto_map": {**FOREIGN, "AutoTokenizer": "tok.Tok"}}), "tok.py": "", "vocab.txt": "v",
    },
}  # fmt: skip


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_model_s_files_and_no_others(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path, dict.fromkeys(STRAY, "x") | FOLDERS[kind])
    (folder / "images").mkdir()
    kept = model_files(folder)
    assert set(kept) == set(FOLDERS[kind]) - {"config.json"}
    assert left_out(folder, kept) == sorted([*STRAY, "images/"])


def test_code_of_the_dense_model_is_none_of_a_tokenizer(tmp_path: Path) -> None:
    write(
        tmp_path, {"config.json": json.dumps({"auto_map": FOREIGN}), "modeling_deepseek.py": "", "tokenizer.json": "{}"}
    )
    assert remote_tokenizer(tmp_path) == []
    assert model_files(tmp_path) == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"tokenizer_config.json": "["}, ("tokenizer_config.json", "not valid JSON")),
        ({"tokenizer_config.json": json.dumps(KIMI), "tokenization_kimi.py": "def ("}, ("tokenization_kimi.py", "not Python")),
    ],
    ids=["config", "code"],
)  # fmt: skip
def test_damaged_files_are_named(files: dict[str, str], parts: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        model_files(write(tmp_path, files))
    assert_one_line(error, tmp_path, *parts)


def test_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").symlink_to("gone")
    with pytest.raises(UserError) as error:
        model_files(tmp_path)
    assert_one_line(error, "merges.txt", "dangling link")


@pytest.mark.parametrize("name", ["../secret.model", "/etc/hostname", ".", "..", "a/b.model", "a\0b"])
def test_names_that_lead_out_are_not_followed(name: str, tmp_path: Path) -> None:
    write(tmp_path, {"inside/tokenizer_config.json": json.dumps({"vocab_file": name}), "secret.model": "s"})
    assert model_files(tmp_path / "inside") == ["tokenizer_config.json"]


def test_every_tokenizer_of_transformers_is_known() -> None:
    """The files that its classes say they are loaded from, read from their code: some classes need libraries to be imported."""
    import transformers

    code = Path(transformers.__file__).parent.rglob("tokenization*.py")
    files = {name for file in code for name in re.findall(r'"[a-z_]+_file": *"([^"]+)"', file.read_text())}
    assert len(files) > 20
    assert files <= TOKENIZER_FILES | {"chat_template.jinja"}
