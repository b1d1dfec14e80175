"""Sessions of one DSA checkpoint that differ in how they choose keys; its weights are in memory once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ....runtime.torch_session import EveryLogit, TorchSession
from ...model.cached_model import CachedModel, open_cached
from ...model.checkpoint import Checkpoint
from ...model.free_memory import weights_that_fit
from .selections import overrides


class Variants:
    """`session(variant, ...)` for "dense", "dsa", "oracle" and "window" of the checkpoint in `folder`.

    dense is the same graph with every key: what the dense checkpoint computes, as the exactness check proves.
    every_logit: sessions give the logits of every token.
    Raises UserError when it is no DSA checkpoint, or when its weights do not fit into the memory that is free.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", every_logit: bool = False
    ) -> None:
        checkpoint = Checkpoint.open(folder)
        self.model: CachedModel = open_cached(checkpoint, dtype, last_only=not every_logit, device=device)
        self.context, self.index_topk = self.model.captured.max_length, self.model.indexer.index_topk
        self._dtype, self._device = dtype, device
        program = self.model.cached.program
        promised = weights_that_fit(checkpoint.path, program.state_dict, self.model.captured.tied, dtype, device)
        self._load = promised.counted(self.model.source.loader(program))
        self._held: dict[str, Tensor] = {}

    def session(self, variant: str, batch: int, capacity: int) -> TorchSession:
        """With caches of its own."""
        cached = self.model.cached
        widths = {f"past_{name}": width for cache in cached.caches for name, width in cache.widths.items()}
        kind = TorchSession if self.model.cached.last_only else EveryLogit
        return kind(
            cached.program, self._weight, widths, batch, capacity, self._dtype, self._device, overrides(variant)
        )

    def _weight(self, name: str) -> Tensor:
        if name not in self._held:
            self._held[name] = self._load(name)
        return self._held[name]
