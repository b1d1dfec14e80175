"""Choose the layers that share an indexer, on the dense model and text that nothing was fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..kernels.spec import IndexerWeights
from ..runtime.shelf import Shelf
from .indexer.calibrate import Calibration
from .indexer.layer_fit import NO_TRAINING
from .model.weights import WeightSource
from .plan import Prepared
from .proof.losses import mean_loss
from .recipe import Recipe
from .share.captured import captured_masses
from .share.choose import Sharing, choose, passes
from .share.programs import sharing_runner


def share_by_loss(
    prepared: Prepared, recipe: Recipe, weights: Mapping[str, IndexerWeights], text: Sequence[Tensor], device: str, shelf: Shelf,
    on_step: Callable[[int, int], None], allow_partial: bool = False,
) -> Sharing:  # fmt: skip
    """weights: an indexer of every layer, by its name; text: [L] ids. on_step(done, all): a pass over the text is done, the first shows
    the attention mass, the others a loss."""
    config, source = prepared.plan.indexer, WeightSource(prepared.checkpoint, prepared.capture, device)
    how = Calibration(config, recipe.rows, NO_TRAINING, recipe.seed, allow_partial)
    masses = captured_masses(source, weights, how, text, shelf)
    done, steps = 1, passes(len(masses))
    on_step(done, steps)

    def loss(shared: tuple[int, ...]) -> float:
        nonlocal done
        runner = sharing_runner(source, weights, replace(config, shared=shared), allow_partial, shelf)
        found = mean_loss(runner, text, config.index_topk, device)
        done += 1
        on_step(done, max(done, steps))
        return found

    return choose(masses, loss, recipe.share_loss)
