"""Run a converted checkpoint's own graph in torch, with caches: what `generate --runtime torch` uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..passes.add_cache import Cached
from ..passes.execute import Runner
from .cached_model import open_cached
from .checkpoint import Checkpoint
from .weights import WeightSource

CACHE_WRITE = torch.ops.mla2dsa.cache_write.default


class TorchSession:
    """A session over `batch` sequences of up to `capacity` tokens; weights stay resident, caches are written in place."""

    def __init__(self, cached: Cached, source: WeightSource, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        load = source.loader(cached.program)
        resident: dict[str, Tensor] = {}
        self._runner = Runner(
            cached.program,
            lambda name: resident[name] if name in resident else resident.setdefault(name, load(name)),
            overrides={CACHE_WRITE: _write_in_place},
        )
        placeholders = {
            n.name: n.meta["val"].dtype
            for n in cached.program.graph.nodes
            if n.op == "placeholder" and n.name.startswith("past_")
        }
        self._device = source.device
        self._caches: dict[str, Tensor] = {}
        for spec in cached.caches:
            for name, width in ((spec.latent, spec.latent_width), (spec.index_key, spec.index_key_width)):
                past = f"past_{name}"
                self._caches[past] = torch.zeros(batch, capacity, width, dtype=placeholders[past], device=source.device)

    def step(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor, last: Tensor) -> Tensor:
        """See `exporters.generation.Session`."""
        inputs = {"input_ids": ids, "position_ids": positions, "slots": slots, "key_begin": key_begin, "last": last}
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        outputs: list[Any] = next(self._runner.outputs_of([{**moved, **self._caches}]))
        logits: Tensor = outputs[0][:, 0].float()
        return logits.cpu()


def _write_in_place(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """The session owns its caches, so a step costs what it writes, not what the cache holds."""
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None].expand_as(slots)
    cache[batch, slots] = new.to(cache.dtype)
    return cache


def open_torch_session(
    folder: Path, batch: int, capacity: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TorchSession:
    """A session on a DSA checkpoint. capacity None: the model's context. Raises UserError."""
    model = open_cached(Checkpoint.open(folder), dtype, last_only=True, device=device)
    context = model.captured.max_length
    if capacity is not None and capacity > context:
        raise UserError(f"a cache of {capacity} tokens is longer than the model's {context} positions")
    return TorchSession(model.cached, model.source, batch, capacity or context)
