"""Convert a dense MLA checkpoint into a DSA checkpoint: plan, calibrate, write, prove, publish."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..exporters.dsa_checkpoint import write_dsa_checkpoint
from ..exporters.staging import check_target
from ..kernels.spec import IndexerWeights
from .calibrate import Calibration, LayerResult, calibrate
from .distil import DistilSchedule
from .plan import Plan, Prepared, prepare
from .progress_store import ProgressStore
from .recipe import CLOSED_FORM_SEQUENCES, DISTIL_SEQUENCES, Recipe
from .text import Tokens, load_tokenizer, random_tokens, read_tokens
from .transformers_check import refuse_if_too_large
from .verify import Verification, open_pair, verify
from .weights import WeightSource

HELD_OUT = 8  # one sequence in so many is kept for choosing the snapshot, as many for the verification
MOST_HELD_OUT = 4


@dataclass(frozen=True)
class Listener:
    """Who is told how far the work is. Every field may be left at its default, which says nothing."""

    on_plan: Callable[[Plan], None] = lambda plan: None
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    on_step: Callable[[str, int, float], None] = lambda layer, step, loss: None
    on_layer: Callable[[LayerResult], None] = lambda result: None


@dataclass(frozen=True)
class Outcome:
    """What happened. verification is None only when it was skipped on request."""

    plan: Plan
    layers: tuple[LayerResult, ...]
    verification: Verification | None
    report: Mapping[str, Any]


@dataclass(frozen=True)
class _Sequences:
    """calibration: fitted on. selection: chooses the snapshot. proof: the verification's, never seen before it."""

    calibration: list[Tensor]
    selection: list[Tensor]
    proof: list[Tensor]
    origin: str


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
    listener: Listener | None = None,
) -> Outcome:
    """Write `out`, whole and verified or not at all. Raises UserError / UsageError with nothing left under `out`."""
    tell, started = listener or Listener(), time.monotonic()
    prepared = prepare(model, recipe)
    plan, checkpoint = prepared.plan, prepared.checkpoint
    tell.on_plan(plan)
    if plan.refusal is not None:
        raise UserError(f"{model}: no DSA checkpoint can be written: {plan.refusal}")
    check_target(checkpoint.path, out, overwrite=overwrite)
    if not (skip_verification or skip_transformers):
        refuse_if_too_large(checkpoint)
    sequences = _sequences(prepared, recipe)
    layers: list[LayerResult] = []
    store = None
    if prepared.donor is None:
        store = ProgressStore.open(out, _fingerprint(prepared, recipe, sequences), resume, overwrite)
        layers = _calibrated(prepared, recipe, sequences, store, device, tell)
        weights = {layer.name: layer.weights for layer in layers}
    else:
        weights = dict(prepared.donor.weights(prepared.converted.found.sites))
    proof: list[Verification] = []

    def prove(folder: Path) -> Mapping[str, Any]:
        if not skip_verification:
            pair = open_pair(checkpoint.path, folder, device, prepared.capture)
            limit = recipe.verify.max_loss_delta
            result = verify(pair, sequences.proof, sequences.origin, limit, skip_transformers, tell.on_progress)
            if not result.passed:
                raise UserError(result.failure())
            proof.append(result)
        return _report(prepared, recipe, sequences, layers, proof, time.monotonic() - started)

    reports: list[Mapping[str, Any]] = []
    write_dsa_checkpoint(
        checkpoint.path, out, _in_layer_order(weights, prepared), plan.indexer,
        manifest={"model": str(model), "recipe": recipe.model_dump(), "verified": not skip_verification},
        overwrite=overwrite, prove=lambda folder: reports.append(prove(folder)) or reports[-1],  # type: ignore[func-returns-value]
    )  # fmt: skip
    if store is not None:
        store.remove()
    return Outcome(plan, tuple(layers), proof[0] if proof else None, reports[-1])


def dry_run(model: str, out: Path, recipe: Recipe, *, overwrite: bool = False) -> Plan:
    """The plan of a conversion, after every check that can be made before work starts."""
    prepared = prepare(model, recipe)
    if prepared.plan.refusal is not None:
        raise UserError(f"{model}: no DSA checkpoint can be written: {prepared.plan.refusal}")
    check_target(prepared.checkpoint.path, out, overwrite=overwrite)
    _sequences(prepared, recipe)
    return prepared.plan


def _in_layer_order(weights: Mapping[str, IndexerWeights], prepared: Prepared) -> dict[str, IndexerWeights]:
    return {site.name: weights[site.name] for site in prepared.converted.found.sites}


def _calibrated(
    prepared: Prepared, recipe: Recipe, sequences: _Sequences, store: ProgressStore, device: str, tell: Listener
) -> list[LayerResult]:
    schedule = (
        DistilSchedule(recipe.distil.steps, recipe.distil.lr, seed=recipe.seed) if recipe.indexer == "distil" else None
    )
    how = Calibration(prepared.plan.indexer, recipe.rows, schedule, recipe.seed)
    source = WeightSource(prepared.checkpoint, prepared.capture, device)
    results = calibrate(
        source, sequences.calibration, sequences.selection, how, store.load(), tell.on_step,
        lambda done, total: tell.on_progress("calibrate", done, total),
    )  # fmt: skip
    return list(_saved(results, store, tell))


def _saved(results: Iterator[LayerResult], store: ProgressStore, tell: Listener) -> Iterator[LayerResult]:
    for result in results:
        store.save(result)
        tell.on_layer(result)
        yield result


def _sequences(prepared: Prepared, recipe: Recipe) -> _Sequences:
    """Cut the text: most of it calibrates; sequences spread over it choose the snapshot and prove the result."""
    topk, context = prepared.plan.indexer.index_topk, prepared.plan.context
    length = recipe.sequence_length or min(context, max(1024, 4 * topk))
    if not topk < length <= context:
        raise UserError(
            f"sequence_length {length}, expected more than index_topk {topk} and at most the context of {context} tokens"
        )
    wanted = recipe.tokens or length * (DISTIL_SEQUENCES if recipe.indexer == "distil" else CLOSED_FORM_SEQUENCES)
    held = recipe.verify.sequences + MOST_HELD_OUT
    text = _tokens(prepared, recipe, wanted + held * length)
    if recipe.sequence_length is None:
        length = min(length, len(text.ids) // 3)
    if length <= topk + 1:
        raise UserError(
            f"{text.origin}: {len(text.ids)} tokens, expected at least {3 * (topk + 2)} (three sequences longer than index_topk {topk}); give more text"
        )
    everything = text.sequences(length)
    if len(everything) < 3:
        raise UserError(
            f"{text.origin}: {len(text.ids)} tokens, expected at least three sequences of {length}; give more text"
        )
    proof = max(1, min(recipe.verify.sequences, len(everything) // HELD_OUT))
    selection = max(1, min(MOST_HELD_OUT, len(everything) // HELD_OUT))
    held_out = _spread(everything, proof + selection)
    rest = [sequence for sequence in everything if not any(sequence is other for other in held_out)]
    chosen = _spread(held_out, selection)
    proving = [sequence for sequence in held_out if not any(sequence is other for other in chosen)]
    return _Sequences(_spread(rest, max(1, min(len(rest), wanted // length))), chosen, proving, text.origin)


def _spread(items: list[Tensor], count: int) -> list[Tensor]:
    """`count` of the items, evenly spaced: a text's end is often unlike the rest of it."""
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _tokens(prepared: Prepared, recipe: Recipe, count: int) -> Tokens:
    if recipe.calibration is None:
        return random_tokens(count, int(prepared.checkpoint.config["vocab_size"]), recipe.seed)
    return read_tokens(recipe.calibration, load_tokenizer(prepared.checkpoint.path))


def _fingerprint(prepared: Prepared, recipe: Recipe, sequences: _Sequences) -> str:
    """Of everything the indexers depend on."""
    digest = hashlib.sha256(prepared.checkpoint.fingerprint().encode())
    digest.update(json.dumps(recipe.model_dump(exclude={"verify"}), sort_keys=True).encode())
    for sequence in sequences.calibration + sequences.selection:
        digest.update(sequence.numpy().tobytes())
    return digest.hexdigest()


def _report(
    prepared: Prepared,
    recipe: Recipe,
    sequences: _Sequences,
    layers: list[LayerResult],
    proof: list[Verification],
    seconds: float,
) -> dict[str, Any]:
    return {
        "plan": prepared.plan.to_json(),
        "recipe": recipe.model_dump(),
        "calibration": {
            "text": sequences.origin,
            "sequences": len(sequences.calibration) if prepared.donor is None else 0,
            "sequence_length": len(sequences.calibration[0]),
            "tokens": sum(len(s) for s in sequences.calibration) if prepared.donor is None else 0,
        },
        "layers": [layer.summary() for layer in layers],
        "verification": proof[0].to_json() if proof else None,
        "seconds": round(seconds, 1),
    }
