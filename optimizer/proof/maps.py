"""Where the keys lie that a selection takes: a few queries of one sequence, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..indexer.indexer_math import select
from ..indexer.samples import SiteSample

QUERIES = 3  # fixed by what fits on a page: every one is a plot with a row for each layer
BINS = 48  # fixed by what half of a page's width shows


@dataclass(frozen=True)
class SelectionMap:
    """How many keys a layer takes for the query at `position` in each of BINS equal stretches of 0..position, by DSA and by the oracle."""

    position: int
    dsa: tuple[int, ...]
    oracle: tuple[int, ...]


def selection_maps(keys: Tensor, index_topk: int, sample: SiteSample) -> tuple[SelectionMap, ...]:
    """Of QUERIES of the sampled rows that have a choice, the last one among them. keys: that DSA takes, [rows, index_topk]."""
    choosing = (sample.rows >= index_topk).nonzero().flatten()
    if not len(choosing):
        return ()
    chosen = sorted({int(choosing[len(choosing) * part // QUERIES - 1]) for part in range(1, QUERIES + 1)})
    return tuple(
        SelectionMap(
            position := int(sample.rows[row]),
            _counts(keys[row], position),
            _counts(select(sample.mass[row, : position + 1][None], index_topk)[0], position),
        )
        for row in chosen
    )


def _counts(keys: Tensor, position: int) -> tuple[int, ...]:
    return tuple(torch.bincount(keys.long().cpu() * BINS // (position + 1), minlength=BINS).tolist())
