"""Where a captured program's tensors come from: names of the graph, resolved to tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...kernels.spec import IndexerWeights
from .capture import Capture
from .checkpoint import Checkpoint
from .stored_names import StoredNames


@dataclass(frozen=True)
class WeightSource:
    """Loads what `program` needs from `checkpoint`, in the dtype the program declares, onto `device`.

    Which of its tensors those are: `names`. Tied tensors are looked up under the name they share.
    `indexers` gives indexer weights that are not in the checkpoint, by layer name.
    """

    checkpoint: Checkpoint
    capture: Capture
    device: str = "cpu"
    indexers: Mapping[str, IndexerWeights] | None = None

    def loader(self, program: ExportedProgram) -> WeightLoader:
        """A function from a parameter or buffer name of `program` (the captured one, or a rewritten one) to its value."""
        return WeightLoader(self, program)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Tensors the checkpoint must hold, and their shapes as config.json gives them."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self.capture.shapes.items():
            if name not in self.capture.tied:
                found |= self.names.parts(name, shape)
        return found

    def shared(self, stored: str) -> str | None:
        """The stored tensor that the model has in the place of this one of the checkpoint (tied embeddings), if it has."""
        name = self.capture.tied.get(self.capture.naming.renamed(stored))
        return None if name is None else next(iter(self.names.parts(name, self.capture.shapes[name])))

    @cached_property
    def names(self) -> StoredNames:
        """Which tensors of the checkpoint each tensor of the captured model is."""
        return StoredNames.of(self.capture.naming, self.checkpoint.tensors, self.capture.shapes)


@dataclass(frozen=True)
class WeightLoader:
    source: WeightSource
    program: ExportedProgram
    _asked: set[str | tuple[str, int]] = field(default_factory=set, compare=False)  # names, and experts of one

    def __call__(self, name: str) -> Tensor:
        self._asked.add(name)
        source = self.source
        constant = self.program.constants.get(name)
        if isinstance(constant, Tensor):
            return constant.to(source.device)
        declared = self.program.state_dict[name]
        layer, _, indexer_tensor = name.partition(".indexer.")
        if source.indexers is not None and indexer_tensor and layer in source.indexers:
            return source.indexers[layer].tensors()[indexer_tensor].to(source.device, declared.dtype)
        name = source.capture.tied.get(name, name)
        parts = source.names.parts(name, tuple(declared.shape))
        if list(parts.values()) == [tuple(declared.shape)]:
            return source.checkpoint.load(next(iter(parts)), dtype=declared.dtype, device=source.device)
        return self._stacked(parts, declared)

    def expert(self, name: str, number: int) -> Tensor:
        """`self(name)[number]` of a parameter that is one expert's after the other's; only that one's tensors are read."""
        self._asked.add((name, number))
        source, declared = self.source, self.program.state_dict[name]
        name = source.capture.tied.get(name, name)
        parts = source.names.parts(name, tuple(declared.shape))
        if list(parts.values()) == [tuple(declared.shape)]:
            return source.checkpoint.load(next(iter(parts)), dtype=declared.dtype, device=source.device, row=number)
        each = len(parts) // source.names.experts(name)
        own = islice(parts, number * each, (number + 1) * each)
        rows = [source.checkpoint.load(part, dtype=declared.dtype) for part in own]
        return torch.cat(rows).to(source.device)

    def look_at_rest(self, names: Iterable[str]) -> None:
        """Load what nobody has asked for of these, an expert at a time: what cannot be read, or is not finite, raises UserError."""
        for name in names:
            if name in self._asked:
                continue
            if name not in self.program.state_dict or not self.source.names.is_stacked(name):
                self(name)
                continue
            for number in range(self.source.names.experts(name)):
                if (name, number) not in self._asked:
                    self.expert(name, number)

    def _stacked(self, parts: Mapping[str, tuple[int, ...]], declared: Tensor) -> Tensor:
        stacked = torch.empty(declared.shape, dtype=declared.dtype, device=self.source.device)
        first = next(iter(parts.values()))
        flat = stacked.view(-1, *first[1:])
        row = 0
        for part, (rows, *_) in parts.items():
            flat[row : row + rows] = self.source.checkpoint.load(part, dtype=declared.dtype)
            row += rows
        flat[row:] = 0  # the graph does not read what is not in a checkpoint
        return stacked
