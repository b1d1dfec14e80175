"""A model opened to answer: a checkpoint, DSA or dense (its own graph, in torch), an exported folder (onnxruntime, or torch for
a .pt2), or an engine folder (TensorRT)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files.dtypes import torch_dtype
from ...files.manifests.engine_manifest import engine_folder, read_engine
from ...files.manifests.export_manifest import is_export, read_export
from ...files.model.stop_tokens import stop_tokens
from ...runtime.devices import usable_device
from ...runtime.generation import Session
from ...runtime.ort_session import OrtSession
from ...runtime.torch_session import open_pt2_session
from ..model.cached_model import dense_config, open_torch_session
from ..model.capture import read_config
from ..model.checkpoint import Checkpoint
from ..model.text import load_tokenizer


@dataclass(frozen=True)
class Opened:
    """One sequence at a time; a session is used again for the next. stop: ids of the tokens that end a text."""

    folder: Path
    session: Session
    tokenizer: Any
    stop: tuple[int, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


def open_model(
    model: str,
    runtime: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    capacity: int | None = None,
    dtype: str | None = None,
) -> Opened:
    """runtime None: onnxruntime for an ONNX export, tensorrt for an engine, else torch. capacity None: all that the model takes. dtype:
    of a checkpoint's weights and caches, None: float32; exports and engines have theirs.

    Raises UserError for what is no model, or not one of this runtime.
    """
    folder, session, _ = _opened(model, runtime, device, 1, capacity, dtype)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    return Opened(folder, session, tokenizer, tuple(_stop(folder, tokenizer)))


def open_session(
    model: str, runtime: str | None, device: str, batch: int, dtype: str | None = None
) -> tuple[Session, int, dict[str, Any]]:
    """(a session of `batch` sequences, of as many tokens as the model takes; words in its vocabulary; its runtime and dtype, None where an
    engine's manifest does not say). Raises as `open_model`."""
    folder, session, runtime = _opened(model, runtime, device, batch, None, dtype)
    if (manifest := _manifest(folder)) is not None:
        return session, int(manifest["model"]["vocab_size"]), {"runtime": runtime, "dtype": manifest.get("dtype")}
    return session, _words(Checkpoint.open(folder)), {"runtime": runtime, "dtype": dtype or "float32"}


def _words(checkpoint: Checkpoint) -> int:
    config = dense_config(checkpoint) if checkpoint.is_dsa() else checkpoint.config
    return int(read_config(config).get_text_config().vocab_size)


def _opened(
    model: str, runtime: str | None, device: str, batch: int, capacity: int | None, dtype: str | None
) -> tuple[Path, Session, str]:
    device, engine = usable_device(device), engine_folder(model)
    if engine is None and runtime == "tensorrt":
        raise UserError(f"{model}: no engine folder; run `mla2dsa build` first, or pass another --runtime")
    if engine is not None:
        return engine, _engine_session(engine, runtime, batch), "tensorrt"
    exported = is_export(model)
    folder = Path(model) if exported else Checkpoint.open(model).path
    runtime = runtime or _natural_runtime(folder, exported)
    return folder, _session(folder, runtime, exported, device, batch, capacity, dtype or "float32"), runtime


def _engine_session(folder: Path, runtime: str | None, batch: int) -> Session:
    from ...runtime.tensorrt_session import open_engine_session

    if runtime not in (None, "tensorrt"):
        raise UserError(f"{folder}: an engine folder, which {runtime} cannot run; pass --runtime tensorrt, or nothing")
    return open_engine_session(folder, batch)


def _natural_runtime(folder: Path, exported: bool) -> str:
    return "onnxruntime" if exported and read_export(folder)["kind"] == "onnx" else "torch"


def _session(
    folder: Path, runtime: str, exported: bool, device: str, batch: int, capacity: int | None, dtype: str
) -> Session:
    if runtime == "onnxruntime":
        if not exported:
            raise UserError(
                f"{folder}: a checkpoint, which onnxruntime cannot run; run `mla2dsa export` first, or pass --runtime torch"
            )
        return OrtSession(folder, batch, capacity)
    if exported:
        return open_pt2_session(folder, batch, capacity, device)
    return open_torch_session(folder, batch, capacity, torch_dtype(dtype), device)


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
