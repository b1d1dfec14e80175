"""The indexers of a conversion: a donor's or calibrated ones, for all layers or for those that do not share another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..exporters.dsa.layout import Layout
from ..files.staging import InTheWay
from ..kernels.spec import IndexerWeights
from ..runtime.processes import processes
from ..runtime.shelf import Shelf
from .before.cuts import Sequences
from .before.fingerprints import layer_fingerprints
from .indexer.calibrate import Calibration, LayerResult, calibrate
from .indexer.layer_fit import NO_TRAINING
from .indexer.progress_store import ProgressStore
from .model.donor import Donor
from .model.weights import WeightSource
from .plan import Plan, Prepared
from .proof.losses import mean_loss
from .recipe import Recipe
from .recipes.layers import trainings
from .share.captured import captured_masses
from .share.choose import Sharing, choose, passes
from .share.programs import sharing_runner

Weights = Mapping[str, IndexerWeights]  # by the layers' names


@dataclass(frozen=True)
class Listener:
    """Who is told how far the work is. Every field may be left at its default, which says nothing.

    on_layer(result, resumed): a layer is done, or was by the run that is resumed.
    """

    on_plan: Callable[[Plan], None] = lambda plan: None
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    on_step: Callable[[str, int, float], None] = lambda layer, step, loss: None
    on_layer: Callable[[LayerResult, bool], None] = lambda result, resumed: None


@dataclass(frozen=True)
class Job:
    """What stays the same from the plan to the report."""

    prepared: Prepared
    recipe: Recipe
    sequences: Sequences
    device: str
    tell: Listener
    remote_code: Sequence[str]  # that the tokenizer is made of, and was allowed to run
    allow_partial: bool = False
    layout: Layout | None = None


@dataclass(frozen=True)
class Indexers:
    """weights: of every layer that has one, and of a donor's also others; layers: results of the calibration, none of a donor's, and in
    the first process alone; sharing: where it was chosen."""

    weights: Weights
    layers: tuple[LayerResult, ...]
    sharing: Sharing | None


@contextmanager
def indexers(job: Job, out: Path, resume: bool, overwrite: bool, shelf: Shelf) -> Iterator[Indexers]:
    """What was calibrated is kept until the block ends well. In every process."""
    if job.prepared.donor is not None:
        donated = _donated(job.prepared, job.prepared.donor)
        yield Indexers(donated, (), _share_by_loss(job, donated, lambda shared: donated, shelf))
        return
    with _kept(job, out, resume, overwrite) as store:
        calibrated = _Calibrated(job, store, shelf)
        weights = calibrated.weights(job.prepared.plan.indexer.shared)
        sharing = _share_by_loss(job, weights, calibrated.weights, shelf)
        layers = calibrated.made[sharing.shared if sharing else job.prepared.plan.indexer.shared]
        yield Indexers({layer.name: layer.weights for layer in layers}, layers if store else (), sharing)


@contextmanager
def _kept(job: Job, out: Path, resume: bool, overwrite: bool) -> Iterator[ProgressStore | None]:
    """The first process's, which is gone once the block ends well."""
    if not processes().first:
        yield None
        return
    names = [name for name, _ in job.prepared.plan.layers]
    marks = layer_fingerprints(job.prepared.checkpoint, job.recipe, job.sequences, names)
    store = ProgressStore.open(out, marks, resume, overwrite)
    try:
        yield store
    except KeyboardInterrupt:
        if count := len(store.finished()):
            raise KeyboardInterrupt(f"{count} finished indexers are kept, pass --resume to go on") from None
        raise
    except InTheWay:  # the result is whole, though elsewhere
        store.remove()
        raise
    finally:
        store.remove_if_empty()
    store.remove()


def _donated(prepared: Prepared, donor: Donor) -> dict[str, IndexerWeights]:
    sites = prepared.converted.found.sites
    rope = sites[0].dims.qk_rope_head_dim
    return dict(donor.weights(sites)) | {module: donor.weights_of(module, rope) for module in prepared.mtp_modules}


@dataclass
class _Calibrated:
    """Indexers for one set of layers that share after another: what is the same in two sets is fitted once.

    made: by set, its numbers, the results of the other layers. store: the first process's.
    """

    job: Job
    store: ProgressStore | None
    shelf: Shelf
    made: dict[tuple[int, ...], tuple[LayerResult, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._done = processes().from_first(lambda: self.store.load() if self.store else {})
        self._told = set[str]()

    def weights(self, shared: tuple[int, ...]) -> Weights:
        if shared not in self.made:
            self.made[shared] = tuple(map(self._heard, self._results(shared)))
        return {layer.name: layer.weights for layer in self.made[shared]}

    def _results(self, shared: tuple[int, ...]) -> Iterator[LayerResult]:
        prepared, recipe, cut, tell = self.job.prepared, self.job.recipe, self.job.sequences, self.job.tell
        trained, config = (
            trainings(recipe, [name for name, _ in prepared.plan.layers]),
            replace(prepared.plan.indexer, shared=shared),
        )
        return calibrate(
            WeightSource(prepared.checkpoint, prepared.capture, self.job.device),
            cut.calibration + cut.beside, cut.selection,
            Calibration(config, recipe.rows, NO_TRAINING, recipe.seed, self.job.allow_partial, trained),
            self._done, tell.on_step, lambda done, total: tell.on_progress("calibrate", done, total), self.shelf, cut.vocabulary,
        )  # fmt: skip

    def _heard(self, result: LayerResult) -> LayerResult:
        if result.key not in self._told:
            resumed = result.key in self._done
            if self.store and not resumed:
                self.store.save(result)
            self.job.tell.on_layer(result, resumed)
        self._told.add(result.key)
        self._done = {**self._done, result.key: result}
        return result


def _share_by_loss(
    job: Job, every: Weights, weights: Callable[[tuple[int, ...]], Weights], shelf: Shelf
) -> Sharing | None:
    """Where the recipe wants them chosen, the layers that share, on the dense model and text that nothing was fitted on. every: an
    indexer of each layer; weights: those of the others where some share. In every process. Tells of passes over the text: the first
    shows the attention mass, the others a loss."""
    if job.recipe.share != "auto":
        return None
    prepared, recipe, text = job.prepared, job.recipe, job.sequences.of_text
    config, source = prepared.plan.indexer, WeightSource(prepared.checkpoint, prepared.capture, job.device)
    how = Calibration(config, recipe.rows, NO_TRAINING, recipe.seed, job.allow_partial)
    masses = captured_masses(source, every, how, text, shelf)
    done, steps = 1, passes(len(masses))
    job.tell.on_progress("share", done, steps)

    def loss(shared: tuple[int, ...]) -> float:
        nonlocal done
        runner = sharing_runner(source, weights(shared), replace(config, shared=shared), job.allow_partial, shelf)
        found = mean_loss(runner, text, config.index_topk, job.device)
        done += 1
        job.tell.on_progress("share", done, max(done, steps))
        return found

    return choose(masses, loss, recipe.share_loss)
