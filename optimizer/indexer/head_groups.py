"""Which MLA heads an index head stands for: itself, or a cluster of heads whose logits look alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .indexer_math import row_blocks
from .samples import SiteSample

CLUSTER_ROWS = 256  # query rows the correlation of heads is measured on; swept by benchmarks/constants.py


def head_groups(samples: Sequence[SiteSample], count: int) -> tuple[tuple[int, ...], ...]:
    """The MLA heads behind each of `count` index heads.

    As many index heads as MLA heads, or more: one each, beginning again when they run out. Fewer: a partition by
    average linkage on the correlation of row-centred logits.
    """
    available = samples[0].query.shape[1]
    if count >= available:
        return tuple((index % available,) for index in range(count))
    return _average_linkage(_logit_correlation(samples), count)


def _logit_correlation(samples: Sequence[SiteSample]) -> Tensor:
    """[H, H] float64: correlation of the heads' logits over all (query, past key), each query's mean taken out."""
    gram: Tensor | float = 0.0
    for sample in samples:
        length, heads = len(sample.key), sample.query.shape[1]
        where = torch.arange(len(sample.rows), device=sample.rows.device)
        where = where[:: max(1, len(where) * len(samples) // CLUSTER_ROWS)]
        for block in row_blocks(where, 2 * heads * length):
            past = torch.arange(length, device=where.device) <= sample.rows[block][:, None]
            logits = (sample.query[block] @ sample.key.T) * past[:, None]
            logits -= logits.sum(-1, keepdim=True) / past.sum(-1)[:, None, None]
            logits *= past[:, None]
            gram = gram + (logits @ logits.mT).double().sum(0)
    assert isinstance(gram, Tensor)
    size = gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    return gram * size[:, None] * size


def _average_linkage(similarity: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """Merges the two most similar clusters until `count` are left; clusters compare by their mean similarity."""
    similarity = similarity.cpu().clone()
    clusters: list[list[int]] = [[index] for index in range(len(similarity))]
    while len(clusters) > count:
        apart = similarity.masked_fill(torch.eye(len(clusters), dtype=torch.bool), -torch.inf)
        first, second = sorted(divmod(int(apart.argmax()), len(clusters)))
        a, b = len(clusters[first]), len(clusters[second])
        merged = (a * similarity[first] + b * similarity[second]) / (a + b)
        similarity[first], similarity[:, first] = merged, merged
        kept = [index for index in range(len(clusters)) if index != second]
        similarity = similarity[kept][:, kept]
        clusters[first] += clusters.pop(second)
    return tuple(sorted(tuple(sorted(cluster)) for cluster in clusters))
