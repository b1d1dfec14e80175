"""How well each layer would do with the selection of a layer before it: attention mass, which a pass over the dense model shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...kernels.spec import IndexerConfig, IndexerWeights
from ...passes.matching.sites import MlaSite
from ...runtime.processes import processes
from ...runtime.shelf import Shelf
from ..indexer.calibrate import Calibration, layer_samples
from ..indexer.indexer_math import mean_captured
from ..indexer.samples import SiteMaps, SiteSample
from ..indexer.sharing import by_layer
from ..model.weights import WeightSource
from .selections import Chosen, captured_by, selected

WINDOW = 3  # layers that follow the one they share with, at most; fixed by GLM-5.2's index_topk_freq, 4


def captured_masses(
    source: WeightSource,
    indexers: Mapping[str, IndexerWeights],
    how: Calibration,
    sequences: Sequence[Tensor],
    shelf: Shelf,
) -> list[tuple[float, ...]]:
    """Of every layer, the mass captured by its own indexer's selection, by that of the layer before it, and so on, WINDOW layers back
    or as many as there are. sequences: [L] ids; of several processes each streams its own, and all have the result."""
    before = list[Chosen]()  # the last first

    def measured(
        site: MlaSite, samples: Sequence[SiteSample], maps: Callable[..., SiteMaps]
    ) -> tuple[tuple[float, ...], Chosen]:
        own = selected(indexers[site.name], how.config, samples)
        return tuple(_mean(chosen, samples, how.config) for chosen in (own, *before)), own

    masses = list[tuple[float, ...]]()
    numbers = processes().own(len(sequences))
    layers = layer_samples(source, sequences, how, shelf=shelf, numbers=numbers)
    for found, own in by_layer(layers, measured, shelf, in_turn=True):
        masses.append(found)
        before[:] = [own, *before][:WINDOW]
    return masses


def _mean(chosen: Chosen, samples: Sequence[SiteSample], config: IndexerConfig) -> float:
    topk = config.index_topk
    found = [captured_by(keys, sample, topk) for keys, sample in zip(chosen.keys, samples, strict=True)]
    return mean_captured(torch.cat(found), topk)
