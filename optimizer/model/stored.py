"""What exporters ask about a checkpoint's tensors: where each one the program needs lies, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
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
        parts = source.names.parts(shared(name), tuple(declared.shape))
        if list(parts.values()) == [tuple(declared.shape)] and source.names.is_stacked(name):
            return list(_unstacked(source, name, next(iter(parts)), declared.dtype))
        return [_stored(source, part, declared.dtype) for part in parts]

    return Weights(shared, stored)


def _unstacked(source: WeightSource, name: str, held: str, dtype: torch.dtype) -> Iterator[Stored]:
    """The experts of a tensor that is stored (as `held`) as the model stacks them: gate and up of each in turn, or down of each."""
    place = source.checkpoint.tensors[held]
    prefix, _, kind = name.rpartition(".")
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    rows, columns = place.shape[1] // len(names), place.shape[2]
    nbytes = place.nbytes // (place.shape[0] * len(names))
    for number in range(source.names.experts(name) * len(names)):
        expert, part = divmod(number, len(names))
        here = place._replace(shape=(rows, columns), offset=place.offset + number * nbytes, nbytes=nbytes)
        load = partial(_part, source, held, expert, slice(part * rows, (part + 1) * rows), dtype)
        yield Stored(f"{prefix}.{expert}.{names[part]}.weight", here, load)


def _part(source: WeightSource, name: str, expert: int, rows: slice, dtype: torch.dtype) -> Tensor:
    return source.checkpoint.load(name, dtype=dtype)[expert, rows]


def _stored(source: WeightSource, name: str, dtype: torch.dtype) -> Stored:
    checkpoint = source.checkpoint
    return Stored(name, checkpoint.tensors[name], partial(checkpoint.load, name, dtype=dtype))
