"""Where a captured program's tensors come from: names of the graph, resolved to tensors of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...kernels.spec import IndexerWeights
from .capture import Capture
from .checkpoint import Checkpoint

_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class WeightSource:
    """Loads what `program` needs from `checkpoint`, in the dtype the program declares, onto `device`.

    transformers stacks a layer's experts into one tensor; checkpoints hold them one by one. Tied tensors are looked up
    under the name they share. `indexers` gives indexer weights that are not in the checkpoint, by layer name.
    """

    checkpoint: Checkpoint
    capture: Capture
    device: str = "cpu"
    indexers: Mapping[str, IndexerWeights] | None = None

    def loader(self, program: ExportedProgram) -> _Loader:
        """A function from a parameter or buffer name of `program` (the captured one, or a rewritten one) to its value."""
        return _Loader(self, program)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Tensors the checkpoint must hold, and their shapes as config.json gives them."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self.capture.shapes.items():
            if name not in self.capture.tied:
                found |= self._sources(name, shape)
        return found

    def _sources(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        match = _EXPERTS.match(name)
        if match is None or name in self.checkpoint.tensors:
            return {name: shape}
        parts = _PARTS[match[2]]
        rows = shape[1] // len(parts)
        count = self.capture.shapes.get(f"{match[1]}.down_proj", shape)[0]  # LongCat's zero experts have no weights
        return {f"{match[1]}.{e}.{part}.weight": (rows, shape[2]) for e in range(count) for part in parts}


@dataclass(frozen=True)
class _Loader:
    source: WeightSource
    program: ExportedProgram

    def __call__(self, name: str) -> Tensor:
        source = self.source
        constant = self.program.constants.get(name)
        if isinstance(constant, Tensor):
            return constant.to(source.device)
        declared = self.program.state_dict[name]
        layer, _, indexer_tensor = name.partition(".indexer.")
        if source.indexers is not None and indexer_tensor and layer in source.indexers:
            return source.indexers[layer].tensors()[indexer_tensor].to(source.device, declared.dtype)
        name = source.capture.tied.get(name, name)
        parts = source._sources(name, tuple(declared.shape))
        if list(parts) == [name]:
            return source.checkpoint.load(name, dtype=declared.dtype, device=source.device)
        return self._stacked(parts, declared)

    def _stacked(self, parts: Mapping[str, tuple[int, ...]], declared: Tensor) -> Tensor:
        stacked = torch.empty(declared.shape, dtype=declared.dtype, device=self.source.device)
        flat = stacked.view(-1, declared.shape[2])
        row = 0
        for part, (rows, _) in parts.items():
            flat[row : row + rows] = self.source.checkpoint.load(part, dtype=declared.dtype)
            row += rows
        flat[row:] = 0  # the graph does not read what is not in a checkpoint
        return stacked
