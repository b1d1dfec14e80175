"""Give every layer its indexer: stream the dense model over calibration text, fit one layer at a time.

The tapped dense program runs piece by piece (one layer's weights in memory), all sequences through each piece. What a
layer's taps show becomes its samples; the closed form is read off them, and optionally distilled. Layers do not depend
on each other: all see the dense model's hidden states. Where layers share an indexer, it is fitted to the mean of what they
attend to (IndexCache, arXiv 2603.12201, trains on such a mean).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...kernels.spec import IndexerConfig, IndexerWeights
from ...passes.matching.sites import MlaSite
from ...passes.mla_to_dsa import prepare as find_sites
from ...passes.tap import ROWS_INPUT, SITE_TAPS, TABLE_TAPS, Tapped, tap
from ...runtime.execute import PieceRunner, Seen
from ...runtime.processes import processes
from ...runtime.shelf import Kept, Shelf
from ..model.weights import WeightLoader, WeightSource
from .distil import DistilSchedule
from .layer_fit import NO_TRAINING, NOTHING_SPENT, Budget, Fit, Samples, Spent, Training, fit
from .samples import ShelvedSamples, SiteMaps, SiteSample
from .sharing import Layer, by_layer
from .site_maps import check_maps, read_maps


@dataclass(frozen=True)
class LayerResult(Fit):
    """A layer's. seconds: only where the budget is of time, 0 otherwise, so that results are the same from run to run. serves: layers
    behind it that attend to what it selects; figures are of the mean over it and them."""

    name: str
    serves: int = 0  # fixed by what a layer is on its own

    @property
    def key(self) -> str:
        """Of the same layer, others where it serves others."""
        return layer_key(self.name, self.serves)

    @property
    def layers(self) -> str:
        """Whose it is, in words."""
        return f"{self.name} and {self.serves} behind it" if self.serves else self.name

    def summary(self) -> dict[str, Any]:
        return {"name": self.name, **{key: val for key, val in vars(self).items() if key not in ("name", "weights")}}


def layer_key(name: str, serves: int) -> str:
    """What tells results of one model apart."""
    return f"{name}+{serves}" if serves else name


def serving(names: Iterable[str], shared: Collection[int]) -> dict[str, list[str]]:
    """The layers behind it that each layer serves, of those that have an indexer. shared: numbers of those that have none."""
    found = dict[str, list[str]]()
    for number, name in enumerate(names):
        if number in shared and found:
            found[next(reversed(found))].append(name)
        else:
            found[name] = []
    return found


@dataclass(frozen=True)
class Calibration:
    """How to calibrate. config: its `shared` layers are given no indexer. rows: query rows sampled per sequence; without training it
    stops at the closed form. of_layer: training of those layers that have one of their own."""

    config: IndexerConfig
    rows: int = 128  # swept by benchmarks/constants.py
    training: Training = NO_TRAINING
    seed: int = 0
    allow_partial: bool = False
    of_layer: Mapping[str, Training] = field(default_factory=dict)

    def training_of(self, layer: str, served: Sequence[str] = ()) -> Training:
        """served: the layers behind it that take its selection."""
        training = self.of_layer.get(layer, self.training)
        if training.budget is None or not training.budget.apart:
            return training
        shares = 1 + sum(self.training_of(one).budget == training.budget for one in served)
        return replace(training, budget=replace(training.budget, shares=shares))

    @property
    def budgeted(self) -> bool:
        """Whether what a layer may take depends on the layers before."""
        return any(training.budget is not None for training in (self.training, *self.of_layer.values()))


OnStep = Callable[[str, int, float], None]  # layer, step, held-out recall or loss
OnSequence = Callable[[int, int], None]  # done, total


def calibrate(
    source: WeightSource,
    sequences: Sequence[Tensor],
    held_out: Sequence[Tensor],
    how: Calibration,
    done: Mapping[str, LayerResult] | None = None,
    on_step: OnStep | None = None,
    on_sequence: OnSequence | None = None,
    shelf: Shelf | None = None,
    vocabulary: Sequence[Tensor] = (),
) -> Iterator[LayerResult]:
    """Yield the result of every MLA layer that has an indexer, in graph order. sequences, held_out, vocabulary: [L] token ids,
    L > index_topk; vocabulary: go through every token, to look at the signs of head weights. done: results of an earlier run by their
    keys, passed through. shelf: as for `layer_samples`. Raises UserError naming the layer when something cannot be read or does not
    converge.
    """
    spent, shared = dict[Budget | None, Spent](), how.config.shared
    serves, finished = _known(source, shared, done or {})
    first, last = len(sequences), len(sequences) + len(held_out)

    def fitted(site: MlaSite, samples: Sequence[SiteSample], maps: Callable[..., SiteMaps]) -> LayerResult:
        if site.name in finished:
            return finished[site.name]
        try:
            parts = Samples(samples[:first], samples[first:last], samples[last:])
            training = how.training_of(site.name, served := serves.get(site.name, []))
            used = spent.get(training.budget, NOTHING_SPENT)
            return _fit(site, maps(samples=samples), parts, how.config, training, used, on_step, len(served))
        except UserError as error:
            raise error if site.name in str(error) else UserError(f"{site.name}: {error}") from error

    shelf, everything = shelf or Shelf(), [*sequences, *held_out, *vocabulary]
    ahead, behind = _to_fit(list(serves), finished)
    layers = layer_samples(source, everything, how, on_sequence, shelf, processes().own(len(everything)))
    fits = by_layer(_with_indexers(layers, shared, shelf), fitted, shelf, finished, in_turn=how.budgeted)
    for result in islice(fits, ahead):
        budget = how.training_of(result.name).budget
        spent[budget] = spent.get(budget, NOTHING_SPENT).and_of(result)
        yield result
    yield from behind


def _known(
    source: WeightSource, shared: Collection[int], done: Mapping[str, LayerResult]
) -> tuple[dict[str, list[str]], dict[str, LayerResult]]:
    """By name, of the layers that have an indexer: the others that they serve, and the results that are there already. Nothing where
    there are neither such others nor results."""
    if not (shared or done):
        return {}, {}
    _, found, _ = find_sites(source.capture.program)
    serves = serving((site.name for site in found.sites), shared)
    keys = {name: layer_key(name, len(others)) for name, others in serves.items()}
    return serves, {name: done[key] for name, key in keys.items() if key in done}


def _with_indexers(layers: Iterable[Layer], shared: Collection[int], shelf: Shelf) -> Iterator[Layer]:
    """The layers that have an indexer, each when the last that it serves is through, with the mean of their attention as its own.
    shared: numbers of the others."""
    leading: Layer | None = None
    for number, layer in enumerate(layers):
        if number in shared and leading is not None:
            leading[1].add_mass(layer[1], shelf)
        else:
            leading = layer
        del layer  # before the next one is gathered
        if number + 1 not in shared:
            given, leading = [leading], None
            yield given.pop()


def _to_fit(names: Sequence[str], finished: Mapping[str, LayerResult]) -> tuple[int | None, list[LayerResult]]:
    """(layers up to the last that is not finished, None for all; results of those after it): nothing is streamed for these. names: of
    the layers with an indexer."""
    if not finished:
        return None, []
    ahead = max((number + 1 for number, name in enumerate(names) if name not in finished), default=0)
    return ahead, [finished[name] for name in names[ahead:]]


def layer_samples(
    source: WeightSource, sequences: Sequence[Tensor], how: Calibration, on_sequence: OnSequence | None = None,
    shelf: Shelf | None = None, numbers: Sequence[int] | None = None,
) -> Iterator[tuple[MlaSite, ShelvedSamples, Callable[..., SiteMaps]]]:  # fmt: skip
    """Stream the dense model; yield (site, a sample per sequence, its linear maps on demand, checked), layer by layer.

    shelf: where samples and hidden states wait (None: on one of its own). numbers: of the sequences to stream (None: all); with
    none of them, layers come all the same. The maps take other `samples` to be checked on."""
    length = min(len(s) for s in sequences)
    if length <= how.config.index_topk:
        raise UserError(
            f"sequences have {length} tokens, expected more than index_topk {how.config.index_topk}; give longer text"
        )
    shelf = shelf or Shelf()
    tapped = tap(source.capture.program, min(how.rows, length), how.allow_partial)
    load = source.loader(tapped.program)
    names = tapped.program.graph_signature.inputs_to_parameters
    sites = {tapped.taps[f"{site.name}.mass"]: site for site in tapped.found.sites}
    runner = PieceRunner(tapped.program, load, [site.core.out.name for site in sites.values()], shelf=shelf)
    numbers = range(len(sequences)) if numbers is None else numbers
    inputs = [_inputs(sequences[number], tapped, how, number, source.device) for number in numbers]
    if not inputs:
        for site in sites.values():
            yield site, ShelvedSamples([]), partial(_checked_maps, site, names, load)
    gathered: list[dict[str, Kept]] = [{} for _ in inputs]
    watch = [node for name, node in tapped.taps.items() if not name.endswith(".attention")]
    steps = runner.until(watch) * len(inputs)
    for seen in _run(runner, load, inputs, watch):
        gathered[seen.sequence] |= {name: shelf.put(tensor[0].float()) for name, tensor in seen.values.items()}
        here, number, piece = [sites[name] for name in seen.values if name in sites], seen.sequence, seen.piece
        del seen  # the next sequence needs the room
        if on_sequence is not None:
            on_sequence(piece * len(inputs) + number + 1, steps)
        if number < len(inputs) - 1:
            continue
        for site in here:
            samples = ShelvedSamples([_sample(site, tapped, kept, inputs[i], shelf) for i, kept in enumerate(gathered)])
            _forget(site, tapped, gathered)
            yield site, samples, partial(_checked_maps, site, names, load, samples=samples)
            del samples  # before the next layer's are gathered


def _run(
    runner: PieceRunner, load: WeightLoader, inputs: Sequence[Mapping[str, Tensor]], watch: Sequence[str]
) -> Iterator[Seen]:
    """What `runner.run` shows. Weights that it does not need (the head's, experts that no token goes to) are looked at all the same:
    values that are not finite are refused, whoever reads them."""
    for piece in range(runner.until(watch), len(runner.pieces)):
        load.look_at_rest(runner.weights(piece))
    for seen in runner.run(inputs, watch):
        if seen.sequence == len(inputs) - 1:
            load.look_at_rest(runner.weights(seen.piece))
        found = [seen]
        del seen  # what is yielded is the caller's alone
        yield found.pop()


def _checked_maps(
    site: MlaSite, names: Mapping[str, str], load: Callable[[str], Tensor], samples: Sequence[SiteSample]
) -> SiteMaps:
    maps = read_maps(site, names, load)
    check_maps(site, maps, samples[0])
    return maps


def _inputs(ids: Tensor, tapped: Tapped, how: Calibration, number: int, device: str) -> dict[str, Tensor]:
    """Token ids with the rows to sample: always rows that have more than index_topk keys, where there is a choice."""
    rows = next(n for n in tapped.program.graph.nodes if n.name == ROWS_INPUT).meta["val"].shape[0]
    generator = torch.Generator().manual_seed(how.seed * 1_000_003 + number)
    first = min(how.config.index_topk, len(ids) - rows)
    picked = (torch.randperm(len(ids) - first, generator=generator)[:rows] + first).sort().values
    batch = {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "position_ids": torch.arange(len(ids))[None],
        ROWS_INPUT: picked,
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _sample(
    site: MlaSite, tapped: Tapped, kept: Mapping[str, Kept], inputs: Mapping[str, Tensor], shelf: Shelf
) -> dict[str, Kept]:
    def tapped_value(name: str) -> Kept:
        return kept[tapped.taps[f"{site.name}.{name}"]]

    named = {name: tapped_value(name) for name in ("hidden", "q_resid", "query", "key", "mass")}
    if site.rope is not None:
        return {**named, **{name: tapped_value(name) for name in TABLE_TAPS}, "rows": shelf.put(inputs[ROWS_INPUT])}
    hidden = named["hidden"].get()
    empty = shelf.put(hidden.new_zeros(len(hidden), 0))
    return {**named, **dict.fromkeys(TABLE_TAPS, empty), "rows": shelf.put(inputs[ROWS_INPUT])}


def _forget(site: MlaSite, tapped: Tapped, gathered: list[dict[str, Kept]]) -> None:
    """Drop what only this site needed; the rotary table is shared by all."""
    for values in gathered:
        for name in SITE_TAPS:
            values.pop(tapped.taps[f"{site.name}.{name}"], None)


def _fit(
    site: MlaSite,
    maps: SiteMaps,
    samples: Samples,
    config: IndexerConfig,
    training: Training,
    spent: Spent,
    on_step: OnStep | None,
    serves: int,
) -> LayerResult:
    report = partial(on_step, site.name) if on_step else None
    if training.schedule is not None:
        training = replace(training, schedule=_seeded(training.schedule, site))
    found = fit(maps, samples, config, training, spent, report)
    timed = training.budget is not None and training.budget.unit == "seconds"
    weights = IndexerWeights(**{name: tensor.cpu() for name, tensor in vars(found.weights).items()})
    return LayerResult(
        **{**vars(found), "weights": weights, "seconds": found.seconds if timed else 0.0}, name=site.name, serves=serves
    )


def _seeded(schedule: DistilSchedule, site: MlaSite) -> DistilSchedule:
    """Every layer shuffles in its own order, the same in every run."""
    salt = int.from_bytes(hashlib.sha256(site.name.encode()).digest()[:4], "little")
    return replace(schedule, seed=schedule.seed + salt)
