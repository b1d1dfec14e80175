"""Dense and sparse side by side on text: loss, KL of the logits, same top token, and what oracle and window would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from ...kernels.spec import IndexerConfig, IndexerWeights
from ...runtime.execute import PieceRunner
from ...runtime.shelf import Shelf
from ..indexer.calibrate import Calibration, layer_samples
from ..indexer.indexer_math import index_scores, mean_recall, oracle_scores, window_scores
from ..indexer.samples import SiteSample
from ..model.weights import WeightSource
from . import baselines

# benchmarks/memory.py --rows: 256 to 2048 take the same time; of 128K tokens in the vocabulary a block has 128 MiB.
POSITIONS = 256  # whose next-token distributions are compared at once
SPARSE_MLA = torch.ops.mla2dsa.sparse_mla.default


@dataclass(frozen=True)
class Quality:
    """One selection against dense attention, over the positions that have more than index_topk keys.

    loss_delta: nats/token, mean and standard error of the paired difference. kl: KL(dense || sparse) of the next-token
    distributions, nats. same_top: share of positions with the same most likely token.
    """

    loss_delta: float
    standard_error: float
    kl: float
    same_top: float


@dataclass(frozen=True)
class TextResult:
    """dense_loss: nats/token at the same positions. by_selection: "dsa", "oracle", "window"."""

    dense_loss: float
    positions: int
    length: int
    by_selection: dict[str, Quality]


@dataclass(frozen=True)
class LayerRecall:
    """Head-mean dense attention mass captured by index_topk keys, on the dense model's hidden states.

    chance: what index_topk keys drawn at random capture on average.
    """

    name: str
    dsa: float
    oracle: float
    window: float
    chance: float


class _Tally:
    """Per-position differences of one selection, kept as numbers only."""

    def __init__(self) -> None:
        self.delta: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []

    def add(self, dense: Tensor, sparse: Tensor, targets: Tensor) -> None:
        """dense, sparse: [N, vocab] logits; targets: [N]."""
        for parts in zip(dense.split(POSITIONS), sparse.split(POSITIONS), targets.split(POSITIONS), strict=True):
            self._add(_log_probabilities(parts[0]), _log_probabilities(parts[1]), parts[2])

    def _add(self, dense: Tensor, sparse: Tensor, targets: Tensor) -> None:
        self.delta.append(F.nll_loss(sparse, targets, reduction="none") - F.nll_loss(dense, targets, reduction="none"))
        self.kl.append((dense.exp() * (dense - sparse)).sum(-1))
        self.same.append((dense.argmax(-1) == sparse.argmax(-1)).float())

    def quality(self) -> Quality:
        delta = torch.cat(self.delta).double()
        error = float(delta.std() / len(delta) ** 0.5) if len(delta) > 1 else float("nan")
        return Quality(float(delta.mean()), error, float(torch.cat(self.kl).mean()), float(torch.cat(self.same).mean()))


def on_text(
    dense: PieceRunner,
    selections: Mapping[str, PieceRunner],
    sequences: Sequence[Tensor],
    index_topk: int,
    device: str = "cpu",
    on_sequence: Callable[[int, int], None] | None = None,
) -> TextResult:
    """Stream all programs in step; one sequence's logits of each are in memory at a time. sequences: [L] ids."""
    inputs = [program_inputs(ids, device) for ids in sequences]
    streams = {name: runner.outputs_of(inputs) for name, runner in selections.items()}
    tallies = {name: _Tally() for name in selections}
    losses: list[Tensor] = []
    for number, (expected, *_) in enumerate(dense.outputs_of(inputs)):
        targets = sequences[number][index_topk + 1 :].to(device)
        expected = _judged(expected, index_topk)
        losses.append(_losses(expected, targets))
        for name, stream in streams.items():
            tallies[name].add(expected, _judged(next(stream)[0], index_topk), targets)
        del expected  # logits of a large vocabulary are the largest thing here
        if on_sequence is not None:
            on_sequence(number + 1, len(sequences))
    loss = torch.cat(losses)
    results = {name: tally.quality() for name, tally in tallies.items()}
    return TextResult(float(loss.double().mean()), len(loss), len(sequences[0]), results)


def _judged(logits: Tensor, index_topk: int) -> Tensor:
    """[N, vocab] at the positions that see more than index_topk keys and have a next token."""
    return logits[0, index_topk:-1]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of every target, [N]."""
    parts = zip(logits.split(POSITIONS), targets.split(POSITIONS), strict=True)
    return torch.cat([F.nll_loss(_log_probabilities(part), wanted, reduction="none") for part, wanted in parts])


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1)


def program_inputs(ids: Tensor, device: str = "cpu") -> dict[str, Tensor]:
    """Inputs of a captured program for one unpadded sequence [L]."""
    positions = torch.arange(len(ids))[None]
    batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(positions), "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def selection_runners(
    program: ExportedProgram, load: Callable[[str], Tensor], cores: Sequence[str], shelf: Shelf | None = None
) -> dict[str, PieceRunner]:
    """The converted program as it is, and with its selection replaced by the oracle's and a window's.

    A weight that one of them has in memory is not loaded by the others again. shelf: as in `PieceRunner`.
    """
    held: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def shared(name: str) -> Tensor:
        tensor = held.get(name)
        return held.setdefault(name, load(name)) if tensor is None else tensor

    replaced: dict[str, dict[Any, Any]] = {
        "dsa": {}, "oracle": {SPARSE_MLA: baselines.oracle}, "window": {SPARSE_MLA: baselines.window}
    }  # fmt: skip
    return {name: PieceRunner(program, shared, cores, other, shelf) for name, other in replaced.items()}


def layer_recalls(
    source: WeightSource,
    indexers: Mapping[str, IndexerWeights],
    config: IndexerConfig,
    sequences: Sequence[Tensor],
    rows: int = Calibration.rows,
    shelf: Shelf | None = None,
) -> list[LayerRecall]:
    """Recall of every layer's indexer on the dense model's hidden states. shelf: as for `layer_samples`."""
    found = []
    for site, samples, _ in layer_samples(source, sequences, Calibration(config, rows), shelf=shelf):
        weights = indexers[site.name]
        found.append(
            LayerRecall(
                site.name,
                mean_recall(lambda s, w=weights: index_scores(w, config, s, s.rows), samples, config.index_topk),  # type: ignore[misc]
                mean_recall(oracle_scores, samples, config.index_topk),
                mean_recall(window_scores, samples, config.index_topk),
                _chance(samples, config.index_topk),
            )
        )
    return found


def _chance(samples: Sequence[SiteSample], index_topk: int) -> float:
    """Every key is drawn with probability index_topk / keys, and the mass of all keys is 1."""
    keys = torch.cat([sample.rows for sample in samples]).double() + 1
    return float((index_topk / keys[keys > index_topk]).mean())
