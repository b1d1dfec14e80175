"""What an indexer selects on samples of the dense model's hidden states, and how much attention mass of a layer that captures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.spec import IndexerConfig, IndexerWeights
from ..indexer.indexer_math import index_scores, select
from ..indexer.samples import SiteSample


@dataclass(frozen=True)
class Chosen:
    """keys: of every sample, [rows, index_topk] int32, what those rows that see fewer select is of no meaning. few: share of the rows
    with a choice that score fewer than index_topk keys above zero, so that the rest is filled up by position."""

    keys: tuple[Tensor, ...]
    few: float


def selected(weights: IndexerWeights, config: IndexerConfig, samples: Sequence[SiteSample]) -> Chosen:
    """By a layer's own indexer."""
    topk, keys, few = config.index_topk, list[Tensor](), list[Tensor]()
    for sample in samples:
        scores = index_scores(weights, config, sample, sample.rows)
        keys.append(select(scores, topk).int())
        few.append(((scores[sample.rows >= topk] > 0).sum(-1) < topk).cpu())
    return Chosen(tuple(keys), float(torch.cat(few).double().mean()))


def captured_by(keys: Tensor, sample: SiteSample, index_topk: int) -> Tensor:
    """Head-mean dense attention mass of the layer of `sample` on these keys, a value for each row that has more than index_topk of
    them. keys: [rows, index_topk] at the same rows, of any layer."""
    counted = sample.rows >= index_topk
    return sample.mass[counted].gather(-1, keys[counted].long().to(sample.mass.device)).sum(-1)
