"""Tiny models of every MLA family saved as transformers saves them, and opened for streaming: shared by several tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from mla2dsa.optimizer.model.capture import Capture, capture
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.runtime.execute import PieceRunner

_FOLDERS: dict[tuple[object, ...], Path] = {}
_CAPTURES: dict[str, Capture] = {}


def config_dict(name: str, **options: Any) -> dict[str, Any]:
    """What config.json of a family's model says."""
    fields: dict[str, Any] = json.loads(families.config(name, **options).to_json_string(use_diff=False))
    architecture = families.FAMILIES[name].class_name
    return {**fields, **({"architectures": [architecture]} if architecture else {})}


def saved(name: str, factory: pytest.TempPathFactory, **options: Any) -> Path:
    """The folder of a family's random float32 model, made once per session: only read it."""
    key = (name, *sorted((field, str(value)) for field, value in options.items()))
    if key not in _FOLDERS:
        folder = factory.mktemp(name)
        families.build(name, **options).save_pretrained(folder)
        _FOLDERS[key] = folder
    return _FOLDERS[key]


def captured(config: Mapping[str, Any], attention: str = "anchor", dtype: torch.dtype = torch.float32) -> Capture:
    """`capture`, once per session for the same config: do not change the program."""
    key = json.dumps([config, attention, str(dtype)], sort_keys=True)
    if key not in _CAPTURES:
        _CAPTURES[key] = capture(config, attention, dtype)
    return _CAPTURES[key]


def opened(folder: Path, attention: str = "anchor") -> WeightSource:
    checkpoint = Checkpoint.open(folder)
    return WeightSource(checkpoint, captured(checkpoint.config, attention))


def run(source: WeightSource, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of the captured program on `batch`, with the checkpoint's weights, in one piece."""
    program = source.capture.program
    logits: Tensor = next(PieceRunner(program, source.loader(program)).outputs_of([batch]))[0]
    return logits


def tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """`families.inputs` without what is not a tensor."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def transformers_model(folder: Path, attention: str = "eager") -> Any:
    """The model as transformers itself loads and runs it."""
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    found = getattr(transformers, architecture).from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32
    )
    return found.eval()


@torch.no_grad()
def whole(program: ExportedProgram, batch: dict[str, Tensor]) -> Tensor:
    """Logits of a program with its own weights, as torch runs it."""
    logits: Tensor = program.module()(**batch, use_cache=False).logits
    return logits


def own_weights(program: ExportedProgram) -> Callable[[str], Tensor]:
    """A loader of copies of a program's own weights."""
    held: dict[str, Any] = {**program.state_dict, **program.constants}
    return lambda name: held[name].clone()
