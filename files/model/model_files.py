"""Which files of a folder belong to the model, beside its config.json and its weights: the others are about it, or no part of it.

    tokenizer       the files that tokenizers of transformers are made of, what tokenizer_config.json names, and for a
                    tokenizer with code of its own that code, what it imports, and the files that the code names
    chat template   chat_template.jinja, additional_chat_templates/
    generation      generation_config.json
    licence         LICENSE, NOTICE ...

A model card, training scripts, images and other formats of the weights stay behind: what they say is said about another model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import UserError
from ..json_files import read_json
from ..safetensors_index import INDEX_FILE, SINGLE_FILE, TensorLocation

CONFIG = "config.json"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
# What transformers' own tokenizers are loaded from (`vocab_files_names` of its classes), and what goes with any tokenizer.
TOKENIZER_FILES = frozenset({
    TOKENIZER_CONFIG, "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model",
    "sentencepiece.bpe.model", "prophetnet.tokenizer", "byte_maps.json", "entity_vocab.json", "normalizer.json", "emoji.json",
    "word_shape.json", "word_pronunciation.json", "dict.txt", "vocab-src.json", "vocab-tgt.json", "source.spm", "target.spm",
    "target_vocab.json", "tekken.json", "tiktoken.model",
})  # fmt: skip
_OTHERS = frozenset({GENERATION_CONFIG, "chat_template.jinja", "chat_template.json"})
_PATTERNS = ("tokenizer.model.v*", "*.tiktoken", "additional_chat_templates/*.jinja")
_LEGAL = re.compile(r"(LICEN[SC]E|NOTICE|COPYING)([-_.].*)?$", re.IGNORECASE)
_TOKENIZER_CLASS = re.compile(r"Auto(Tokenizer|Processor)")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NOT_LISTED = {".git", ".cache"}  # version control and download bookkeeping


def is_folder(model: str | Path) -> bool:
    """Whether a model's name is that of a folder; otherwise it looks like a hub id. Raises UserError where it is neither."""
    path = Path(model)
    if path.is_file():
        raise UserError(f"{path}: is a file; give the folder that holds it")
    if not path.is_dir() and (isinstance(model, Path) or not _HUB_ID.fullmatch(model)):
        raise UserError(f"{model}: no such folder (and not a hub id, which looks like owner/name)")
    return path.is_dir()


def model_files(folder: Path) -> list[str]:
    """Relative names, in order; every one is a file. Raises UserError for a link to nowhere."""
    names = {name for name in (*TOKENIZER_FILES, *_OTHERS) if _is_file(folder / name)}
    for pattern in _PATTERNS:
        names |= {path.relative_to(folder).as_posix() for path in folder.glob(pattern) if _is_file(path)}
    names |= {path.name for path in folder.iterdir() if _LEGAL.match(path.name) and _is_file(path)}
    names |= set(_named_in_config(folder))
    for code in tokenizer_code(folder):
        names |= {code, *_named_in_code(folder, folder / code)}
    return sorted(names)


def checkpoint_files(folder: Path, tensors: Mapping[str, TensorLocation]) -> list[str]:
    """`model_files`, the weight files that hold `tensors`, and their index: a checkpoint, but for its config.json."""
    names = {place.file.name for place in tensors.values()}
    if names != {SINGLE_FILE}:
        names.add(INDEX_FILE)
    return sorted({*names, *model_files(folder)})


def left_out(folder: Path, kept: Iterable[str]) -> list[str]:
    """What lies in `folder` itself, files and folders (with a slash), of which nothing is among `kept`."""
    first = {CONFIG, *(PurePosixPath(name).parts[0] for name in kept)}
    others = (path for path in folder.iterdir() if path.name not in first | _NOT_LISTED)
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in others)


def remote_tokenizer(folder: Path) -> list[str]:
    """The classes that a tokenizer with code of its own is made of ("tokenization_kimi.TikTokenTokenizer"), none for others."""
    found: list[str] = []
    for file in (TOKENIZER_CONFIG, CONFIG):
        remote = optional_json(folder / file).get("auto_map")
        for name, code in (remote if isinstance(remote, dict) else {"AutoTokenizer": remote}).items():
            if _TOKENIZER_CLASS.match(name):
                found += [it for it in (code if isinstance(code, list) else [code]) if isinstance(it, str)]
    return list(dict.fromkeys(found))


def tokenizer_code(folder: Path) -> list[str]:
    """The Python files in `folder` that the tokenizer's own code is in, with what they import of their neighbours."""
    waiting = [f"{name.rpartition('.')[0]}.py" for name in remote_tokenizer(folder) if "--" not in name]
    found: list[str] = []
    while waiting:
        name = waiting.pop()
        if name not in found and Path(name).name == name and _is_file(folder / name):
            found.append(name)
            waiting += [f"{module}.py" for module in _neighbours(_parsed(folder / name))]
    return sorted(found)


def optional_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    return read_json(file) if _is_file(file) else {}


def _named_in_config(folder: Path) -> Iterator[str]:
    """Files of the folder that a value of tokenizer_config.json names, as `"vocab_file": "words.model"`."""
    values = optional_json(folder / TOKENIZER_CONFIG).values()
    yield from _existing(folder, (value for value in values if isinstance(value, str)))


def _named_in_code(folder: Path, code: Path) -> Iterator[str]:
    """Files of the folder that a string of the code names: `vocab_files_names`, however it is put together."""
    texts = (node.value for node in ast.walk(_parsed(code)) if isinstance(node, ast.Constant))
    yield from _existing(folder, (text for text in texts if isinstance(text, str)))


def _existing(folder: Path, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        plain = 0 < len(text) < 256 and "\0" not in text and Path(text).name == text and text not in (".", "..")
        if plain and text != CONFIG and not text.endswith(".safetensors") and _is_file(folder / text):
            yield text


def _neighbours(tree: ast.AST) -> Iterator[str]:
    """Modules that `from .x import y`, `from . import x` name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def _parsed(code: Path) -> ast.AST:
    try:
        return ast.parse(code.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"{code}: the tokenizer's own code, not Python ({error}); fetch the file again") from None


def _is_file(path: Path) -> bool:
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to nowhere (dangling link); fetch the file again, or remove the link")
    return path.is_file()
