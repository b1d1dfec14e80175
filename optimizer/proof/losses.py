"""Loss of one selection alone, on text: what sharing an indexer costs is a difference of two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.execute import PieceRunner
from ...runtime.processes import processes
from .evaluate import program_inputs
from .figures import blocks, log_probabilities


def mean_loss(runner: PieceRunner, sequences: Sequence[Tensor], index_topk: int, device: str = "cpu") -> float:
    """nats/token of a program's logits where a query sees more than index_topk keys. sequences: [L] ids; of several processes each
    takes its own, and all have the result."""
    numbers = processes().own(len(sequences))
    inputs, own = [program_inputs(sequences[number], device) for number in numbers], list[Tensor]()
    for number, logits in zip(numbers, runner.logits_of(inputs) if inputs else (), strict=True):
        ids = sequences[number].to(device)
        for positions in blocks(index_topk, len(ids) - 1):
            expected = ids[positions.start + 1 : positions.stop + 1]
            own.append(F.nll_loss(log_probabilities(logits.rows(positions)), expected, reduction="none").cpu())
        del logits
    losses = [loss for part in processes().gathered(own) for loss in part]
    return float(torch.cat(losses).double().mean())
