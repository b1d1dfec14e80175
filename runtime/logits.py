"""Logits of which a few rows are in memory at a time: those of a sequence of 8192 tokens over 128 thousand words are 4.2 GB."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..kernels.products import linear

Head = tuple[Tensor, Tensor | None]  # weight [V, D] and bias [V] of a linear layer


@dataclass(frozen=True)
class Logits:
    """[B, T, V], given as they are, or by what the last linear layer makes of `x` [B, T, D]. head: gives that layer, and is asked
    when rows are, once: it is as large as the vocabulary, too."""

    x: Tensor
    head: Callable[[], Head] | None = None

    @property
    def tokens(self) -> int:
        return int(self.x.shape[1])

    @cached_property
    def _layer(self) -> Head:
        assert self.head is not None
        return self.head()

    def rows(self, positions: slice, sequence: int = 0) -> Tensor:
        """logits[sequence, positions], [n, V]."""
        x = self.x[sequence, positions]
        return x if self.head is None else linear(x, *self._layer)
