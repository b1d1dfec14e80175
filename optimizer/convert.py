"""Convert a dense MLA checkpoint into a DSA checkpoint: plan, calibrate, write, prove, publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from ..files.staging import check_target, claim
from ..kernels.spec import IndexerWeights
from ..runtime.devices import usable_device
from ..runtime.processes import processes
from ..runtime.shelf import Shelf
from .after.report import conversion_report, dropped_fields
from .before.binding import target_verdicts
from .before.cuts import cut_text
from .before.findings import Findings
from .before.fingerprints import fingerprint as of_everything
from .before.preflight import check_conversion
from .before.resources import Resources
from .before.resources import refuse_if_too_large as refuse_conversion
from .before.space import existing_parent
from .indexer.calibrate import LayerResult
from .indexer.progress_store import ProgressStore
from .indexer.query_form import settle
from .indexers import Indexers, Job, Listener, indexers
from .model.checkpoint import Checkpoint
from .model.text import load_tokenizer
from .model.weights import WeightSource
from .plan import Plan, Prepared, layout_of, prepare
from .proof.pair import open_pair
from .proof.transformers_check import refuse_if_too_large
from .recipe import WRITTEN, Recipe
from .recipes.resolved import Chosen, is_spent_otherwise, kept_text, resolved
from .share.choose import Sharing
from .verify import FailedVerification, Verification, verify


@dataclass(frozen=True)
class Outcome:
    """What happened. verification is None only when it was skipped on request."""

    plan: Plan
    layers: tuple[LayerResult, ...]
    verification: Verification | None
    report: Mapping[str, Any]


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
        with indexers(job, out, resume, overwrite, shelf) as made:
            job = _shared(job, made.sharing)
            prove = partial(_proved, job, skip_transformers, shelf)
            return _written(job, out, made, None if skip_verification else prove, started)


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
    job: Job,
    out: Path,
    made: Indexers,
    proved: Callable[[Path], Verification] | None,
    started: float,
) -> Outcome:
    """The checkpoint at `out`, which gets that name once it is proved. started: as time.monotonic() tells it. The first process
    writes it, all prove it."""
    if not processes().first:
        return Outcome(job.prepared.plan, made.layers, proved(processes().from_first(Path)) if proved else None, {})
    prepared, proof, reports = job.prepared, list[Verification](), list[Mapping[str, Any]]()
    layout, checkpoint = job.layout, prepared.checkpoint
    assert layout is not None  # `_settled`

    def prove(folder: Path) -> Mapping[str, Any]:
        if proved is not None:
            proof.append(proved(processes().from_first(lambda: folder)))
        report = conversion_report(
            prepared, job.recipe, job.sequences, layout, job.remote_code, layers=made.layers, sharing=made.sharing,
            proof=proof[0] if proof else None, seconds=time.monotonic() - started,
        )  # fmt: skip
        reports.append(report)
        return report

    recipe = _resolved(job, layout, made.layers)
    write_dsa_checkpoint(
        checkpoint.path, out, _without_shared(prepared, made.weights), prepared.plan.indexer, layout=layout,
        q_width=prepared.plan.layers[0][1].q_width, mtp=checkpoint.mtp_tensors(),
        manifest={"model": prepared.plan.model, "recipe": recipe.fields(), "verified": proved is not None,
                  "remote_code": list(job.remote_code), "fingerprint": _fingerprint(job, WRITTEN)},
        dropped=dropped_fields(checkpoint), prove=prove, draw=partial(page_if_any, page_title(out)) if proved and can_draw() else None,
        recipe=kept_text(
            recipe, prepared.plan.model, spent=is_spent_otherwise(job.recipe), allow_partial=job.allow_partial,
            trust_remote_code=bool(job.remote_code), drop_stale_quantization=bool(dropped_fields(checkpoint)),
        ),
    )  # fmt: skip
    return Outcome(prepared.plan, made.layers, proof[0] if proof else None, reports[0])


def _shared(job: Job, sharing: Sharing | None) -> Job:
    """With the layers that share in the plan, where they were chosen. Raises UserError where a target does not load that."""
    if sharing is None:
        return job
    prepared = job.prepared
    return _for_targets(replace(job, prepared=replace(prepared, plan=prepared.plan.sharing(sharing.shared))))


def _without_shared(prepared: Prepared, weights: Mapping[str, IndexerWeights]) -> dict[str, IndexerWeights]:
    return {name: own for name, own in weights.items() if name not in prepared.plan.shared}


def _resolved(job: Job, layout: Layout, layers: Sequence[LayerResult]) -> Recipe:
    planned, length = job.prepared.plan.resources.sequence_length, len(job.sequences.proof[0])
    names = [name for name, _ in job.prepared.plan.layers] if layers else []
    steps = dict.fromkeys(names, 0) | {layer.name: layer.steps for layer in layers}
    return resolved(job.recipe, Chosen(job.prepared.plan.indexer, planned, length, layout.name, steps))


def _job(
    prepared: Prepared,
    recipe: Recipe,
    device: str,
    tell: Listener,
    trust_remote_code: bool,
    allow_partial: bool = False,
) -> Job:
    code = remote_tokenizer(prepared.checkpoint.path) if trust_remote_code and recipe.calibration else []
    sequences = cut_text(prepared, recipe, trust_remote_code)
    return Job(prepared, recipe, sequences, device, tell, code, allow_partial)


def _settled(job: Job) -> Job:
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


def _for_targets(job: Job) -> Job:
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


def _check_same(job: Job) -> None:
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


def _proved(job: Job, skip_transformers: bool, shelf: Shelf, folder: Path) -> Verification:
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


def _fingerprint(job: Job, also: Sequence[str] = ()) -> str:
    return of_everything(job.prepared.checkpoint, job.recipe, job.sequences, also)
