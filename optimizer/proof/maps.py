"""Where the keys lie that a selection takes: a few queries of one sequence, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.spec import IndexerConfig, IndexerWeights
from ..indexer.indexer_math import index_scores, select
from ..indexer.samples import SiteSample

QUERIES = 3  # fixed by what fits on a page: every one is a plot with a row for each layer
BINS = 48  # fixed by what half of a page's width shows


@dataclass(frozen=True)
class SelectionMap:
    """How many keys a layer takes for the query at `position` in each of BINS equal stretches of 0..position, by DSA and by the oracle."""

    position: int
    dsa: tuple[int, ...]
    oracle: tuple[int, ...]


def selection_maps(weights: IndexerWeights, config: IndexerConfig, sample: SiteSample) -> tuple[SelectionMap, ...]:
    """Of QUERIES of the sampled rows that have a choice, the last one among them."""
    choosing = (sample.rows >= config.index_topk).nonzero().flatten()
    if not len(choosing):
        return ()
    chosen = sorted({int(choosing[len(choosing) * part // QUERIES - 1]) for part in range(1, QUERIES + 1)})
    positions = sample.rows[chosen]
    by_dsa, by_oracle = index_scores(weights, config, sample, positions), sample.mass[chosen]
    return tuple(
        SelectionMap(
            position, *(_counts(scores[row, : position + 1], config.index_topk) for scores in (by_dsa, by_oracle))
        )
        for row, position in enumerate(positions.tolist())
    )


def _counts(scores: Tensor, index_topk: int) -> tuple[int, ...]:
    """scores: of all keys that the query sees."""
    keys = select(scores[None], index_topk)[0].cpu()
    return tuple(torch.bincount(keys * BINS // scores.numel(), minlength=BINS).tolist())
