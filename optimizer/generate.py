"""Generate text from a checkpoint, DSA or dense (its own graph, in torch), an exported folder (onnxruntime, or torch for a .pt2),
or an engine folder (TensorRT)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError, UserError
from ..files.manifests.engine_manifest import engine_folder, read_engine
from ..files.manifests.export_manifest import is_export, read_export
from ..files.model.stop_tokens import stop_tokens
from ..runtime.generation import Sampling, Session, generate
from ..runtime.ort_session import OrtSession
from ..runtime.torch_session import open_pt2_session
from .model.cached_model import open_torch_session
from .model.checkpoint import Checkpoint
from .model.text import load_tokenizer


def generate_text(
    model: str,
    prompt: str,
    runtime: str | None,
    max_new_tokens: int,
    sampling: Sampling,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece. runtime None: onnxruntime for an ONNX export, tensorrt for an engine,
    else torch.

    Raises UserError / UsageError before the first piece.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}, expected at least 1")
    engine = engine_folder(model)
    if engine is None and runtime == "tensorrt":
        raise UserError(f"{model}: no engine folder; run `mla2dsa build` first, or pass another --runtime")
    if engine is not None:
        folder, session = engine, _engine_session(engine, runtime)
    else:
        exported = is_export(model)
        folder = Path(model) if exported else Checkpoint.open(model).path
        session = _session(folder, runtime or _natural_runtime(folder, exported), exported, device)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    ids = tokenizer(prompt)["input_ids"]
    return _pieces(tokenizer, generate(session, [ids], max_new_tokens, sampling, _stop(folder, tokenizer)))


def _engine_session(folder: Path, runtime: str | None) -> Session:
    from ..runtime.tensorrt_session import open_engine_session

    if runtime not in (None, "tensorrt"):
        raise UserError(f"{folder}: an engine folder, which {runtime} cannot run; pass --runtime tensorrt, or nothing")
    return open_engine_session(folder, batch=1)


def _natural_runtime(folder: Path, exported: bool) -> str:
    return "onnxruntime" if exported and read_export(folder)["kind"] == "onnx" else "torch"


def _session(folder: Path, runtime: str, exported: bool, device: str) -> Session:
    if runtime == "onnxruntime":
        if not exported:
            raise UserError(
                f"{folder}: a checkpoint, which onnxruntime cannot run; run `mla2dsa export` first, or pass --runtime torch"
            )
        return OrtSession(folder, batch=1)
    if exported:
        return open_pt2_session(folder, batch=1, device=device)
    return open_torch_session(folder, batch=1, device=device)


def _stop(folder: Path, tokenizer: Any) -> list[int]:
    """What the folder's files or its manifest say, and what the tokenizer itself does: its code may know better."""
    known = set(stop_tokens(folder))
    if (manifest := _manifest(folder)) is not None:
        known |= set(manifest["model"]["eos_token_id"])
    if tokenizer.eos_token_id is not None:
        known.add(tokenizer.eos_token_id)
    return sorted(known)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Of an export or an engine."""
    if engine_folder(folder) is not None:
        return read_engine(folder)
    return read_export(folder) if is_export(folder) else None


def _pieces(tokenizer: Any, steps: Iterator[list[int | None]]) -> Iterator[str]:
    """Text as it becomes certain: a character may take several tokens, and spaces depend on what came before."""
    ids: list[int] = []
    shown = ""
    for (token,) in steps:
        if token is None:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(ids)
    if text.startswith(shown) and len(text) > len(shown):
        yield text[len(shown) :]
