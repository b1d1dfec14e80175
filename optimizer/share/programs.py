"""The converted program of a dense model with indexers that are at hand, some layers sharing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...kernels.spec import IndexerConfig, IndexerWeights
from ...passes.mla_to_dsa import mla_to_dsa
from ...runtime.execute import Override, PieceRunner
from ...runtime.shelf import Shelf
from ..model.weights import WeightLoader, WeightSource


@dataclass(frozen=True)
class _WithIndexers:
    dense: WeightLoader
    tensors: Mapping[str, Tensor]

    def __call__(self, name: str) -> Tensor:
        return self.tensors[name] if name in self.tensors else self.dense(name)

    def expert(self, name: str, number: int) -> Tensor:
        return self.dense.expert(name, number)


def sharing_runner(
    source: WeightSource,
    weights: Mapping[str, IndexerWeights],
    config: IndexerConfig,
    allow_partial: bool,
    shelf: Shelf,
    replaced: Mapping[Any, Override] | None = None,
) -> PieceRunner:
    """weights: by layer name, of every layer that has an indexer by `config`, and maybe others. replaced: ops, as in `PieceRunner`."""
    converted = mla_to_dsa(source.capture.program, config, allow_partial=allow_partial)
    tensors = {
        f"{layer}.indexer.{name}": tensor.to(source.device)
        for layer, own in weights.items()
        for name, tensor in own.tensors().items()
    }
    load = _WithIndexers(source.loader(converted.program), tensors)
    return PieceRunner(converted.program, load, [change.after for change in converted.changes], replaced, shelf)
