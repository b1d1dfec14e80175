"""Convert a dense MLA checkpoint into a DSA checkpoint: plan, calibrate, write, prove, publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..exporters.dsa.checkpoint import write_dsa_checkpoint
from ..exporters.dsa.layout import Layout
from ..exporters.dsa.names import UNPROVEN_CONFIG, file_names
from ..exporters.report.page import page_if_any, page_title
from ..exporters.report.plots import can_draw
from ..files.model.model_files import remote_tokenizer
from ..files.staging import InTheWay, check_target, claim
from ..kernels.spec import IndexerWeights
from ..runtime.devices import usable_device
from ..runtime.processes import processes
from ..runtime.shelf import Shelf
from .after.report import conversion_report, dropped_fields, with_indexers
from .before.binding import target_verdicts
from .before.cuts import Sequences, cut_text
from .before.findings import Findings
from .before.fingerprints import fingerprint as of_everything
from .before.fingerprints import layer_fingerprints
from .before.preflight import check_conversion
from .before.resources import Resources
from .before.resources import refuse_if_too_large as refuse_conversion
from .before.space import existing_parent
from .indexer.calibrate import Calibration, LayerResult, calibrate
from .indexer.layer_fit import NO_TRAINING
from .indexer.progress_store import ProgressStore
from .indexer.query_form import settle
from .model.checkpoint import Checkpoint
from .model.donor import Donor
from .model.text import load_tokenizer
from .model.weights import WeightSource
from .plan import Plan, Prepared, layout_of, prepare
from .proof.pair import open_pair
from .proof.transformers_check import refuse_if_too_large
from .recipe import WRITTEN, Recipe
from .recipes.layers import trainings
from .recipes.resolved import Chosen, is_spent_otherwise, kept_text, resolved
from .share.choose import Sharing
from .shared_layers import share_by_loss
from .verify import FailedVerification, Verification, verify


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
class Outcome:
    """What happened. verification is None only when it was skipped on request."""

    plan: Plan
    layers: tuple[LayerResult, ...]
    verification: Verification | None
    report: Mapping[str, Any]


@dataclass(frozen=True)
class _Job:
    """What stays the same from the plan to the report."""

    prepared: Prepared
    recipe: Recipe
    sequences: Sequences
    device: str
    tell: Listener
    remote_code: Sequence[str]  # that the tokenizer is made of, and was allowed to run
    allow_partial: bool = False
    layout: Layout | None = None


def convert(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    skip_verification: bool = False,
    skip_transformers: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    drop_stale: bool = False,
    allow_partial: bool = False,
    listener: Listener | None = None,
) -> Outcome:
    """Write `out`, whole and verified or not at all. Raises UserError / UsageError with nothing left under `out`; at once when
    another run is at it.
    Finished layers outlive a failure, Ctrl-C or kill in a hidden folder beside `out`, for `resume`; KeyboardInterrupt
    then carries a line that says so. Of several processes, the first alone looks at `out`, and begins."""
    started = time.monotonic()
    if processes().first:
        with Findings() as found:
            check_conversion(found, model, out, recipe, overwrite=overwrite, drop_stale=drop_stale)
    device = usable_device(device)
    with ExitStack() as claimed:

        def check(checkpoint: Checkpoint) -> None:
            _check_before_work(checkpoint, out, recipe, resume, overwrite)
            claimed.enter_context(claim(out, _inputs(checkpoint, recipe), overwrite=overwrite))
            if not (skip_verification or skip_transformers):
                refuse_if_too_large(checkpoint)

        prepared = _prepared(model, recipe, allow_partial, check, drop_stale)
        job = _settled(_job(prepared, recipe, device, listener or Listener(), trust_remote_code, allow_partial))
        shelf = _shelf(out, prepared.plan.resources)
        job.tell.on_plan(prepared.plan)
        with _indexers(job, out, resume, overwrite, shelf) as (weights, layers):
            job, sharing = _shared(job, weights, shelf)
            prove = partial(_proved, job, skip_transformers, shelf)
            return _written(job, out, weights, layers, sharing, None if skip_verification else prove, started)


def _prepared(
    model: str, recipe: Recipe, allow_partial: bool, check: Callable[[Checkpoint], None], drop_stale: bool
) -> Prepared:
    """In the first process after `check`, in the others once it is through. Raises UserError when the plan has a refusal."""
    first = processes().first
    if not first:
        processes().wait()  # the model is here, and OUT is ours

    def checked(checkpoint: Checkpoint) -> None:
        if first:
            check(checkpoint)
            processes().wait()

    prepared = prepare(model, recipe, allow_partial, check=checked, drop_stale=drop_stale)
    if prepared.plan.refusal:
        raise UserError(prepared.plan.refusal)
    return prepared


def _written(
    job: _Job,
    out: Path,
    weights: Mapping[str, IndexerWeights],
    layers: tuple[LayerResult, ...],
    sharing: Sharing | None,
    proved: Callable[[Path], Verification] | None,
    started: float,
) -> Outcome:
    """The checkpoint at `out`, which gets that name once it is proved. started: as time.monotonic() tells it. The first process
    writes it, all prove it."""
    if not processes().first:
        return Outcome(job.prepared.plan, layers, proved(processes().from_first(Path)) if proved else None, {})
    prepared, proof, reports = job.prepared, list[Verification](), list[Mapping[str, Any]]()
    layout, checkpoint = job.layout, prepared.checkpoint
    assert layout is not None  # `_settled`

    def prove(folder: Path) -> Mapping[str, Any]:
        if proved is not None:
            proof.append(proved(processes().from_first(lambda: folder)))
        report = conversion_report(
            prepared, job.recipe, job.sequences, layout, job.remote_code, layers=layers, sharing=sharing,
            proof=proof[0] if proof else None, seconds=time.monotonic() - started,
        )  # fmt: skip
        reports.append(report)
        return report

    recipe = _resolved(job, layout, layers)
    write_dsa_checkpoint(
        checkpoint.path, out, _without_shared(prepared, weights), prepared.plan.indexer, layout=layout,
        q_width=prepared.plan.layers[0][1].q_width, mtp=checkpoint.mtp_tensors(),
        manifest={"model": prepared.plan.model, "recipe": recipe.fields(), "verified": proved is not None,
                  "remote_code": list(job.remote_code), "fingerprint": _fingerprint(job, WRITTEN)},
        dropped=dropped_fields(checkpoint), prove=prove, draw=partial(page_if_any, page_title(out)) if proved and can_draw() else None,
        recipe=kept_text(
            recipe, prepared.plan.model, spent=is_spent_otherwise(job.recipe), allow_partial=job.allow_partial,
            trust_remote_code=bool(job.remote_code), drop_stale_quantization=bool(dropped_fields(checkpoint)),
        ),
    )  # fmt: skip
    return Outcome(prepared.plan, with_indexers(prepared, layers), proof[0] if proof else None, reports[0])


def _shared(job: _Job, weights: Mapping[str, IndexerWeights], shelf: Shelf) -> tuple[_Job, Sharing | None]:
    """With the layers that share in the plan, where they are to be chosen; and how they were. weights: of all layers, in every
    process. Raises UserError where a target does not load that."""
    if job.recipe.share != "auto":
        return job, None
    prepared, tell = job.prepared, partial(job.tell.on_progress, "share")
    text = job.sequences.of_text
    sharing = share_by_loss(prepared, job.recipe, weights, text, job.device, shelf, tell, job.allow_partial)
    return _for_targets(replace(job, prepared=replace(prepared, plan=prepared.plan.sharing(sharing.shared)))), sharing


def _without_shared(prepared: Prepared, weights: Mapping[str, IndexerWeights]) -> dict[str, IndexerWeights]:
    return {name: own for name, own in weights.items() if name not in prepared.plan.shared}


def _resolved(job: _Job, layout: Layout, layers: Sequence[LayerResult]) -> Recipe:
    planned, length = job.prepared.plan.resources.sequence_length, len(job.sequences.proof[0])
    steps = {layer.name: layer.steps for layer in layers}
    return resolved(job.recipe, Chosen(job.prepared.plan.indexer, planned, length, layout.name, steps))


def _job(
    prepared: Prepared,
    recipe: Recipe,
    device: str,
    tell: Listener,
    trust_remote_code: bool,
    allow_partial: bool = False,
) -> _Job:
    code = remote_tokenizer(prepared.checkpoint.path) if trust_remote_code and recipe.calibration else []
    sequences = cut_text(prepared, recipe, trust_remote_code)
    return _Job(prepared, recipe, sequences, device, tell, code, allow_partial)


def _settled(job: _Job) -> _Job:
    """With the layout; where the model has no query latent, the way of making one is chosen on the real weights, before work."""
    _check_same(job)
    prepared = job.prepared
    assert prepared.layout is not None  # or the plan's refusal was raised
    if not processes().first:
        return job  # what is written is no affair of the others
    source = WeightSource(prepared.checkpoint, prepared.capture, job.device)
    sequence = (job.sequences.calibration or job.sequences.proof)[0]
    try:
        layout = settle(prepared.layout, source, sequence, prepared.plan.indexer, job.recipe.layout)
    except UserError as error:
        raise UserError(f"{prepared.checkpoint.path}: {error}") from None
    return _for_targets(replace(job, layout=layout))


def _for_targets(job: _Job) -> _Job:
    """With what the targets make of it in the plan. Raises UserError where one that was asked for does not load it."""
    prepared, layout = job.prepared, job.layout
    if layout is None:
        return job  # what is written is no affair of other processes than the first
    checkpoint, sizes = prepared.checkpoint, prepared.plan.indexer
    targets = target_verdicts(
        checkpoint.path, checkpoint.config, checkpoint.tensors, layout, sizes, mtp_indexers=bool(prepared.mtp_modules)
    )
    if unmet := [one for one in targets if one.target in job.recipe.target and not one.loads]:
        raise UserError(f"--target {unmet[0].target} ({unmet[0].version}): {unmet[0]} ({layout.why})")
    plan = replace(prepared.plan, targets=targets)
    return replace(job, prepared=replace(prepared, plan=plan))


def _check_same(job: _Job) -> None:
    """Raises UserError unless all processes were given the same; they may be on several machines."""
    mine, *others = processes().gathered(_fingerprint(job))
    if differing := [number for number, other in enumerate(others, start=1) if other != mine]:
        raise UserError(
            f"process {differing[0]} reads another model, recipe or text than process 0; put the same files on every machine"
        )


def fingerprint(
    model: str, recipe: Recipe, trust_remote_code: bool = False, drop_stale: bool = False, allow_partial: bool = False
) -> str:
    """Of everything that the result of a conversion depends on; its manifest has it, too."""
    prepared = prepare(model, recipe, allow_partial, drop_stale=drop_stale)
    return _fingerprint(_job(prepared, recipe, "cpu", Listener(), trust_remote_code), WRITTEN)


def dry_run(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    drop_stale: bool = False,
    allow_partial: bool = False,
) -> Plan:
    """The plan of a conversion, after every check that can be made before work starts. Writes nothing."""
    prepared = prepare(
        model, recipe, allow_partial, check=lambda checkpoint: _check_before_work(checkpoint, out, recipe, resume, overwrite),
        drop_stale=drop_stale,
    )  # fmt: skip
    cut_text(prepared, recipe, trust_remote_code)
    return prepared.plan


def _check_before_work(checkpoint: Checkpoint, out: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Raises UserError / UsageError for what needs no graph to see: the layout and what is in the way at `out`."""
    layout_of(checkpoint, recipe)
    check_target(out, _inputs(checkpoint, recipe), overwrite=overwrite)
    file_names(checkpoint.path, checkpoint.whole_tensors)
    if recipe.donor is None:
        ProgressStore.check(out, resume, overwrite)


def _inputs(checkpoint: Checkpoint, recipe: Recipe) -> list[Path]:
    """Folders that the conversion reads, and that `out` may not replace."""
    donor = Path(recipe.donor) if recipe.donor else None
    return [checkpoint.path, *([donor] if donor is not None and donor.is_dir() else [])]


def _shelf(out: Path, needed: Resources) -> Shelf:
    """Where hidden states wait: on the file system of `out`. Raises UserError when there, or in memory, is no room for what is
    needed."""
    place = existing_parent(out.parent)
    refuse_conversion(needed, place, processes().beside)
    return Shelf(place)


@contextmanager
def _indexers(
    job: _Job, out: Path, resume: bool, overwrite: bool, shelf: Shelf
) -> Iterator[tuple[dict[str, IndexerWeights], tuple[LayerResult, ...]]]:
    """(weights by layer name, results of the calibration); what was calibrated is kept until the block ends well. Other processes than
    the first have weights where they choose with it, and no results."""
    if not processes().first and job.prepared.donor is None:
        done = tuple(_calibrated(job, None, shelf))
        yield {layer.name: layer.weights for layer in done} if job.recipe.share == "auto" else {}, ()
        return
    if job.prepared.donor is not None:
        yield _donated(job.prepared, job.prepared.donor), ()
        return
    names = [name for name, _ in job.prepared.plan.layers]
    marks = layer_fingerprints(job.prepared.checkpoint, job.recipe, job.sequences, names)
    store = ProgressStore.open(out, marks, resume, overwrite)
    try:
        layers = tuple(_calibrated(job, store, shelf))
        yield {layer.name: layer.weights for layer in layers}, layers
    except KeyboardInterrupt:
        if count := len(store.finished()):
            raise KeyboardInterrupt(f"{count} finished layers are kept, pass --resume to go on") from None
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


def _calibrated(job: _Job, store: ProgressStore | None, shelf: Shelf) -> Iterator[LayerResult]:
    """store: the first process's."""
    recipe, tell = job.recipe, job.tell
    finished = processes().from_first(lambda: store.load() if store else {})
    cut, trained = job.sequences, trainings(recipe, [name for name, _ in job.prepared.plan.layers])
    unheard = job.prepared.plan.shared  # their indexers are not written
    results = calibrate(
        WeightSource(job.prepared.checkpoint, job.prepared.capture, job.device),
        cut.calibration + cut.beside, cut.selection,
        Calibration(job.prepared.plan.indexer, recipe.rows, NO_TRAINING, recipe.seed, job.allow_partial, trained),
        finished, tell.on_step, lambda done, total: tell.on_progress("calibrate", done, total), shelf, cut.vocabulary,
    )  # fmt: skip
    for result in results:
        resumed = result.name in finished
        if store and not resumed:
            store.save(result)
        if result.name not in unheard:
            tell.on_layer(result, resumed)
        yield result


def _proved(job: _Job, skip_transformers: bool, shelf: Shelf, folder: Path) -> Verification:
    """Raises UserError naming the first check that does not hold."""
    checkpoint = job.prepared.checkpoint
    stale = bool(dropped_fields(checkpoint))
    pair = open_pair(
        checkpoint.path, folder, job.device, job.prepared.capture, UNPROVEN_CONFIG, drop_stale=stale,
        allow_partial=job.allow_partial,
    )  # fmt: skip
    text, limit = job.sequences, job.recipe.verify.max_loss_delta
    trusted = bool(job.remote_code)
    decode = load_tokenizer(checkpoint.path, trusted).decode if job.recipe.calibration else None
    result = verify(pair, text.proof, text.origin, limit, skip_transformers, job.tell.on_progress, shelf, decode=decode)
    processes().wait()  # nobody reads the folder any more, which is renamed next
    if not result.passed:
        raise FailedVerification(result)
    return result


def _fingerprint(job: _Job, also: Sequence[str] = ()) -> str:
    return of_everything(job.prepared.checkpoint, job.recipe, job.sequences, also)
