"""Logits of which a few rows are in memory at a time: those of a sequence of 8192 tokens over 128 thousand words are 4.2 GB."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Logits:
    """[B, T, V], given as they are, or by what the last linear layer makes of `x` [B, T, D]: weight [V, D], bias [V]."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.x.shape[1])

    def rows(self, positions: slice, sequence: int = 0) -> Tensor:
        """logits[sequence, positions], [n, V]."""
        x = self.x[sequence, positions]
        return x if self.weight is None else F.linear(x, self.weight, self.bias)
