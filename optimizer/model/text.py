"""Calibration and evaluation text: a file, a folder or .jsonl becomes token sequences of one length."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError, short
from ...files.model.model_files import GENERATION_CONFIG, remote_tokenizer
from ...files.regular import open_regular
from .capture import read_config
from .checkpoint import Checkpoint

RANDOM = "random tokens"
_WEIGHTS = (".safetensors", ".engine", ".onnx", ".pt2", ".so")


@dataclass(frozen=True)
class Tokens:
    """ids: [N] int64, documents joined by the end-of-text token; origin: the path, or RANDOM."""

    ids: Tensor
    origin: str

    def sequences(self, length: int, count: int | None = None) -> list[Tensor]:
        """Up to `count` sequences [length], non-overlapping and spread evenly over the text.

        Raises UserError when the text is shorter than one sequence.
        """
        available = len(self.ids) // length
        if available == 0:
            raise UserError(
                f"{self.origin}: {len(self.ids)} tokens, expected at least {length} (one sequence); give more text"
            )
        chosen = available if count is None else min(count, available)
        starts = [int(i * available / chosen) * length for i in range(chosen)]
        return [self.ids[start : start + length] for start in starts]

    def split(self, held_out: float) -> tuple[Tokens, Tokens]:
        """(first part, last part): the last `held_out` share is never calibrated on."""
        cut = round(len(self.ids) * (1 - held_out))
        return Tokens(self.ids[:cut], self.origin), Tokens(self.ids[cut:], self.origin)


def model_tokens(
    checkpoint: Checkpoint, path: str | Path | None, count: int, seed: int = 0, trust_remote_code: bool = False
) -> Tokens:
    """The text at `path` in the checkpoint's own tokens; without a path `count` random ones.

    Raises UserError when there is no text, or no tokenizer that goes with the model.
    """
    vocabulary = vocabulary_size(checkpoint)
    if path is None:
        return random_tokens(count, vocabulary, seed)
    tokens = read_tokens(path, load_tokenizer(checkpoint.path, trust_remote_code))
    if int(tokens.ids.max()) >= vocabulary:
        raise UserError(
            f"{checkpoint.path}: the tokenizer gives token {int(tokens.ids.max())}, config.json has vocab_size {vocabulary}; "
            "fetch tokenizer and config.json from the same revision"
        )
    return tokens


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """As the model's class has it."""
    return int(read_config(checkpoint.config).get_text_config().vocab_size)


def random_tokens(count: int, vocab_size: int, seed: int = 0) -> Tokens:
    """Uniformly random ids: good enough for second moments, says nothing about quality on text."""
    generator = torch.Generator().manual_seed(seed)
    return Tokens(torch.randint(0, vocab_size, (count,), generator=generator), RANDOM)


def vocabulary_sequences(length: int, count: int, vocab_size: int, seed: int = 0) -> list[Tensor]:
    """`count` sequences [length] of random tokens, each token as often as any other: shuffled vocabularies, one after another."""
    generator = torch.Generator().manual_seed(seed)
    needed = -(-count * length // vocab_size)
    shuffled = [torch.randperm(vocab_size, generator=generator) for _ in range(needed)]
    return list(torch.cat(shuffled)[: count * length].view(count, length)) if count else []


def read_tokens(path: str | Path, tokenizer: Any, limit: int | None = None) -> Tokens:
    """Tokenise the text at `path` (stops after about `limit` tokens). Raises UserError when there is none."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder of text")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    ids: list[int] = []
    for document in documents(path):
        if end is not None:
            ids.append(end)
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit:
            break
    if len(ids) <= 1:
        raise UserError(f'{path}: no text in it; give a text file, a folder of them, or .jsonl with a "text" field')
    return Tokens(torch.tensor(ids[:limit] if limit else ids), str(path))


def documents(path: Path) -> Iterator[str]:
    """The non-empty texts at `path`, in order of file name; of a folder all files but hidden ones, README and LICENSE.

    Raises UserError for files that are not text.
    """
    for file in _text_files(path) if path.is_dir() else [path]:
        content = _read(file)
        texts = _jsonl(file, content) if file.suffix == ".jsonl" else [content]
        yield from (text for text in texts if text.strip())


def _text_files(folder: Path) -> list[Path]:
    """A corpus folder usually says what it is and under which licence; that is not part of the corpus."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [
        file
        for file in files
        if not file.name.startswith(("README", "LICENSE"))
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _read(file: Path) -> str:
    try:
        with open_regular(file) as stream:
            return io.TextIOWrapper(stream, encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); give plain text or .jsonl") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _jsonl(file: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f'{file}: line {number} is not an object with a "text" string')
        yield text


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer. Raises UserError when it has none transformers can load.

    trust_remote_code: run the tokenizer's own code if it has any. Without, none runs: None, transformers' default, would ask
    on stdin.
    """
    from transformers import AutoTokenizer

    for file in folder.iterdir():
        if not file.is_dir() and file.suffix not in _WEIGHTS:
            open_regular(file).close()  # a tokenizer's library would wait for what comes out of a FIFO
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a missing or foreign tokenizer
        code = remote_tokenizer(folder)
        if code and not trust_remote_code:
            raise UserError(
                f"{folder}: the tokenizer is code of its own ({code[0]}), which is not run unasked; read it, then pass "
                "--trust-remote-code"
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{folder}: no tokenizer that transformers can load, needed to read text ({short(reason, 160)})"
        ) from error


def generation_config(folder: Path, remedy: str) -> Any:
    """transformers' own, None without the file. Raises UserError, which ends with `remedy`, for a file that it does not take."""
    if not (folder / GENERATION_CONFIG).is_file():
        return None
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its validators raise
        reason = short((str(error).strip().splitlines() or [type(error).__name__])[0], 160)
        raise UserError(
            f"{folder / GENERATION_CONFIG}: transformers does not accept it ({reason}); {remedy}"
        ) from error
