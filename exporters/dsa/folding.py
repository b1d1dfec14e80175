"""The steps of `steps.py` on tensors, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ...files.dtypes import BY_SAFETENSORS, torch_dtype
from .steps import Derived, Fill, Interleave, InverseDiagonal, Pad, Step, Times


def derive(made: Derived, source: Tensor) -> Tensor:
    """The tensor `made` of the DSA checkpoint, contiguous, from the source's."""
    tensor = source
    for step in made.steps:
        tensor = _apply(step, tensor, made)
    return tensor.to(torch_dtype(BY_SAFETENSORS[made.dtype].name)).contiguous()


def undo(made: Derived, tensor: Tensor) -> Tensor:
    """The source's tensor, bit for bit, contiguous. `made` has to be exact."""
    for step in reversed(made.steps):
        match step:
            case Interleave():
                tensor = halves(tensor, step)
            case Pad():
                tensor = tensor[:, : step.before]
            case _:
                raise ValueError(f"{made.name}: {step} cannot be taken back")
    return tensor.contiguous()


def _apply(step: Step, tensor: Tensor, made: Derived) -> Tensor:
    match step:
        case Interleave():
            return pairs(tensor, step)
        case Pad():
            return torch.nn.functional.pad(tensor, (0, step.after - step.before))
        case Times():
            return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32) * step.factor
        case InverseDiagonal():
            return torch.diag(1 / tensor.float())
        case Fill():
            return _filled(step, made.shape)


def _filled(step: Fill, shape: tuple[int, ...]) -> Tensor:
    if step.diagonal:
        return torch.eye(*shape) * step.value
    if step.only is None:
        return torch.full(shape, step.value)
    tensor = torch.zeros(shape)
    tensor[step.only] = step.value
    return tensor


def pairs(tensor: Tensor, at: Interleave) -> Tensor:
    """Rotary rows of halves become pairs. Raises ValueError when the tensor has no such rows."""
    rows, half = _rotary(tensor, at), at.rope // 2
    return _with(tensor, at, torch.stack([rows[:, :half], rows[:, half:]], 2).flatten(1, 2))


def halves(tensor: Tensor, at: Interleave) -> Tensor:
    """Inverse of `pairs`."""
    rows = _rotary(tensor, at)
    return _with(tensor, at, torch.cat([rows[:, ::2], rows[:, 1::2]], 1))


def _blocks(tensor: Tensor, at: Interleave) -> Tensor:
    """[blocks, rows of a block, bytes of a row]: rows are moved as bytes, for float8 has no indexing of its own."""
    if tensor.shape[0] % at.blocks or at.offset + at.rope > tensor.shape[0] // at.blocks or at.rope % 2:
        raise ValueError(f"{list(tensor.shape)} has no rotary rows as {at} says")
    return tensor.contiguous().view(torch.uint8).view(at.blocks, tensor.shape[0] // at.blocks, -1)


def _rotary(tensor: Tensor, at: Interleave) -> Tensor:
    return _blocks(tensor, at)[:, at.offset : at.offset + at.rope]


def _with(tensor: Tensor, at: Interleave, rotary: Tensor) -> Tensor:
    blocks = _blocks(tensor, at).clone()
    blocks[:, at.offset : at.offset + at.rope] = rotary
    return blocks.view(-1).view(tensor.dtype).view(tensor.shape)
