"""What exporters ask about a checkpoint's tensors: where each one the program needs lies, and how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.export import ExportedProgram

from ...exporters.onnx_model.external_data import Stored
from ...exporters.onnx_model.to_onnx import Weights
from .weights import WeightSource


def stored_weights(source: WeightSource, program: ExportedProgram) -> Weights:
    """`source`'s tensors by the names of `program`. Values load in the dtype the program declares."""

    def shared(name: str) -> str:
        return source.capture.tied.get(name, name)

    def stored(name: str) -> Sequence[Stored]:
        declared = program.state_dict[name]
        parts = source._sources(shared(name), tuple(declared.shape))
        return [_stored(source, part, declared.dtype) for part in parts]

    return Weights(shared, stored)


def _stored(source: WeightSource, name: str, dtype: torch.dtype) -> Stored:
    checkpoint = source.checkpoint
    return Stored(name, checkpoint.tensors[name], partial(checkpoint.load, name, dtype=dtype))
