"""Dense and sparse side by side on text: loss, KL of the logits, same top token, and what oracle and window would do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from ...kernels.spec import IndexerConfig, IndexerWeights
from ...passes.matching.sites import MlaSite
from ...runtime.execute import Loader, PieceRunner
from ...runtime.logits import Logits
from ...runtime.processes import processes
from ...runtime.shelf import Shelf
from ..indexer.calibrate import Calibration, layer_samples
from ..indexer.indexer_math import mean_captured, mean_recall, oracle_scores, window_scores
from ..indexer.samples import SiteMaps, SiteSample
from ..indexer.sharing import by_layer
from ..model.weights import WeightSource
from ..share.selections import Chosen, captured_by, selected
from . import baselines
from .figures import NAN, Decode, Quality, Tally, blocks, log_probabilities, quality
from .fp8 import Fp8Scores
from .maps import SelectionMap, selection_maps

SPARSE_MLA = torch.ops.mla2dsa.sparse_mla.default
LIGHTNING_INDEXER = torch.ops.mla2dsa.lightning_indexer.default


@dataclass(frozen=True)
class TextResult:
    """dense_loss: nats/token at the same positions. by_selection: "dsa", "oracle", "window", and "dsa-fp8" where it was asked for;
    fp8_same_keys: the share of keys that scores in FP8 choose like those in float32."""

    dense_loss: float
    positions: int
    length: int
    by_selection: dict[str, Quality]
    fp8_same_keys: float | None = None

    @property
    def dense_ppl(self) -> float:
        return math.exp(min(self.dense_loss, 700.0))


@dataclass(frozen=True)
class LayerRecall:
    """Head-mean dense attention mass captured by index_topk keys, on the dense model's hidden states.

    chance: what index_topk keys drawn at random capture on average. few_positive: share of the rows with more than index_topk
    keys that score fewer of them above zero, so that the rest is filled up by position. maps: of the first sequence.
    """

    name: str
    dsa: float
    oracle: float
    window: float
    chance: float
    few_positive: float = NAN
    maps: tuple[SelectionMap, ...] = ()


def on_text(
    dense: PieceRunner,
    selections: Mapping[str, PieceRunner],
    sequences: Sequence[Tensor],
    index_topk: int,
    device: str = "cpu",
    on_sequence: Callable[[int, int], None] | None = None,
    decode: Decode | None = None,
) -> TextResult:
    """Stream all programs in step; logits of a few positions of one sequence are in memory at a time. sequences: [L] ids, of which each of
    several processes takes its own; all of them get the result. decode: for the excerpt of the worst sequence."""
    shared, own = processes(), list[_Figures]()
    numbers = shared.own(len(sequences))
    inputs = [program_inputs(sequences[number], device) for number in numbers]
    streams = {name: runner.logits_of(inputs) for name, runner in selections.items()}
    for number, expected in zip(numbers, dense.logits_of(inputs) if inputs else (), strict=True):
        found = {name: next(stream) for name, stream in streams.items()}
        own.append(_figures(expected, found, sequences[number].to(device), index_topk))
        del expected, found  # logits of a large vocabulary are the largest thing here
        if on_sequence is not None:
            on_sequence(len(own), len(numbers))
    figures = shared.in_order(own)
    loss = torch.cat([of.losses for of in figures])
    results = {
        name: quality([of.tallies[name] for of in figures], sequences, index_topk + 1, decode) for name in selections
    }
    return TextResult(float(loss.double().mean()), len(loss), len(sequences[0]), results)


@dataclass(frozen=True)
class _Figures:
    """Of one sequence. losses: nats of every judged target, [N]; tallies: by selection."""

    losses: Tensor
    tallies: dict[str, Tally]


def _figures(dense: Logits, selections: Mapping[str, Logits], ids: Tensor, index_topk: int) -> _Figures:
    """At the positions that see more than index_topk keys and have a next token. ids: [L]."""
    losses, tallies = list[Tensor](), {name: Tally() for name in selections}
    for positions in blocks(index_topk, len(ids) - 1):
        targets = ids[positions.start + 1 : positions.stop + 1]
        expected = log_probabilities(dense.rows(positions))
        losses.append(F.nll_loss(expected, targets, reduction="none").cpu())
        for name, logits in selections.items():
            tallies[name].add(expected, log_probabilities(logits.rows(positions)), targets)
    return _Figures(torch.cat(losses), tallies)


def program_inputs(ids: Tensor, device: str = "cpu") -> dict[str, Tensor]:
    """Inputs of a captured program for one unpadded sequence [L]."""
    positions = torch.arange(len(ids))[None]
    batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(positions), "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class _Shared:
    """A loader for several runners. Experts that are loaded one by one are nobody's for long enough."""

    load: Loader
    _held: WeakValueDictionary[str, Tensor] = field(default_factory=WeakValueDictionary)

    def __call__(self, name: str) -> Tensor:
        tensor = self._held.get(name)
        return self._held.setdefault(name, self.load(name)) if tensor is None else tensor

    @property
    def expert(self) -> Callable[[str, int], Tensor] | None:
        return getattr(self.load, "expert", None)


def selection_runners(
    program: ExportedProgram, load: Loader, cores: Sequence[str], shelf: Shelf | None = None,
    fp8: Fp8Scores | None = None,
) -> dict[str, PieceRunner]:  # fmt: skip
    """The converted program as it is, and with its selection replaced by the oracle's and a window's; with `fp8` also with its
    indexers' scores in FP8.

    A weight that one of them has in memory is not loaded by the others again. shelf: as in `PieceRunner`.
    """
    shared = _Shared(load)
    replaced: dict[str, dict[Any, Any]] = {
        "dsa": {}, "oracle": {SPARSE_MLA: baselines.oracle}, "window": {SPARSE_MLA: baselines.window}
    }  # fmt: skip
    if fp8 is not None:
        replaced["dsa-fp8"] = {LIGHTNING_INDEXER: fp8}
    return {name: PieceRunner(program, shared, cores, other, shelf) for name, other in replaced.items()}


def layer_recalls(
    source: WeightSource,
    indexers: Mapping[str, IndexerWeights],
    config: IndexerConfig,
    sequences: Sequence[Tensor],
    rows: int = Calibration.rows,
    shelf: Shelf | None = None,
) -> list[LayerRecall]:
    """Recall of every layer's indexer on the dense model's hidden states; of a layer without one, of what the last layer before it
    that has one selects. shelf: as for `layer_samples`."""
    before = list[Chosen]()  # of the last layer that selects

    def measured(
        site: MlaSite, samples: Sequence[SiteSample], maps: Callable[..., SiteMaps]
    ) -> tuple[LayerRecall, Chosen]:
        topk, own = config.index_topk, site.name in indexers
        chosen = selected(indexers[site.name], config, samples) if own else before[-1]
        captured = torch.cat(
            [captured_by(keys, sample, topk) for keys, sample in zip(chosen.keys, samples, strict=True)]
        )
        recall = LayerRecall(
            site.name,
            mean_captured(captured, topk),
            mean_recall(oracle_scores, samples, topk),
            mean_recall(window_scores, samples, topk),
            _chance(samples, topk),
            chosen.few,
            selection_maps(chosen.keys[0], topk, samples[0]),
        )
        return recall, chosen if config.shared else Chosen((), NAN)

    shelf = shelf or Shelf()
    numbers = processes().own(len(sequences))
    layers = layer_samples(source, sequences, Calibration(config, rows), shelf=shelf, numbers=numbers)
    recalls = list[LayerRecall]()
    for recall, chosen in by_layer(layers, measured, shelf, in_turn=bool(config.shared)):
        recalls.append(recall)
        if recall.name in indexers:
            before[:] = [chosen]
    return recalls


def _chance(samples: Sequence[SiteSample], index_topk: int) -> float:
    """Every key is drawn with probability index_topk / keys, and the mass of all keys is 1."""
    keys = torch.cat([sample.rows for sample in samples]).double() + 1
    return float((index_topk / keys[keys > index_topk]).mean())
