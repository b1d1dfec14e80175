"""Which kernels serve which device, and how to say otherwise."""

from __future__ import annotations

import os
from types import ModuleType

import torch

from ..errors import UserError

KERNELS_ENV = "MLA2DSA_KERNELS"
_FORCED = ("reference", "triton")


def kernels_for(device: torch.device, cpu: ModuleType, reference: ModuleType) -> ModuleType:
    """The module whose functions run an op: `cpu` on CPU tensors, the Triton kernels on CUDA tensors, else `reference`.
    MLA2DSA_KERNELS=reference or triton chooses for all devices. Raises UserError if it says anything else."""
    forced = os.environ.get(KERNELS_ENV)
    if forced and forced not in _FORCED:
        raise UserError(f"{KERNELS_ENV}={forced} is not known: unset it, or set it to {' or '.join(_FORCED)}")
    if forced == "triton" or (device.type == "cuda" and not forced):
        from .gpu import dispatch

        return dispatch
    return cpu if device.type == "cpu" and not forced else reference
