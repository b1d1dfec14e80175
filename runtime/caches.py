"""The caches of one batch, as an exported graph takes them: they start small and double as the sequences grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files.sizes import FIRST_CAPACITY


class Caches:
    """`tensors`: [batch, length, width] by input name, zeros at first. `capacity`: the most slots they may get.

    Work and memory grow with the length of a cache, not with the tokens in it, so a cache is no longer than it has to be.
    first: slots at first; default FIRST_CAPACITY.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: str = "cpu",
        first: int | None = None,
    ) -> None:
        self._capacity, self._dtype, self._device = capacity, dtype, device
        self._length = 0
        self.tensors: dict[str, Tensor] = {}
        self._resize(
            {name: (batch, width) for name, width in widths.items()},
            min(FIRST_CAPACITY if first is None else first, capacity),
        )

    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens; what is in the caches stays. Callers check the capacity before."""
        if slots > self._length:
            sizes = {name: (cache.shape[0], cache.shape[2]) for name, cache in self.tensors.items()}
            self._resize(sizes, min(self._capacity, max(slots, 2 * self._length)))

    def _resize(self, sizes: Mapping[str, tuple[int, int]], length: int) -> None:
        for name, (batch, width) in sizes.items():
            grown = torch.zeros(batch, length, width, dtype=self._dtype, device=self._device)
            old = self.tensors.get(name)
            if old is not None:
                grown[:, : old.shape[1]] = old
            self.tensors[name] = grown
        self._length = length


def widths_of(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Width of each cache by input name, from the manifest of an export."""
    return {part["input"]: int(part["width"]) for cache in manifest["caches"] for part in _parts(cache)}


def outputs_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Output name of each cache by input name."""
    return {part["input"]: part["output"] for cache in manifest["caches"] for part in _parts(cache)}


def _parts(cache: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A layer that shares the selection of an earlier one has no index keys."""
    return [part for part in (cache["latent"], cache["index_key"]) if part is not None]
