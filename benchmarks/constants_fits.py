"""Part of constants.py: indexers of tiny-mla fitted with one constant at another value, and what they cost on text."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tiny_text import TINY, training_text
from torch import Tensor

from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer import layer_fit
from mla2dsa.optimizer.indexer.calibrate import Calibration, layer_samples
from mla2dsa.optimizer.indexer.distil import DistilSchedule
from mla2dsa.optimizer.indexer.head_weights import negative_share
from mla2dsa.optimizer.indexer.indexer_math import index_scores, mean_recall, oracle_scores
from mla2dsa.optimizer.indexer.layer_fit import NO_TRAINING, NOTHING_SPENT, Samples, Training, fit
from mla2dsa.optimizer.indexer.samples import SiteMaps, SiteSample
from mla2dsa.optimizer.model.text import load_tokenizer, random_tokens, read_tokens, vocabulary_sequences
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.optimizer.plan import Prepared, prepare
from mla2dsa.optimizer.proof import baselines
from mla2dsa.optimizer.proof.evaluate import SPARSE_MLA, on_text, program_inputs
from mla2dsa.optimizer.recipe import CLOSED_FORM_SEQUENCES, DISTIL_SEQUENCES, Distil, Recipe, read_recipe
from mla2dsa.passes.matching.sites import MlaSite
from mla2dsa.passes.mla_to_dsa import Converted, mla_to_dsa
from mla2dsa.runtime.execute import PieceRunner
from mla2dsa.runtime.logits import Logits

TOPK, LENGTH, SELECTION = 64, 1024, 4
MOST_ROWS = 128  # sampled once; a trial takes an even share of them
FOREIGN = ("llama", "t5", "clip", "whisper")  # models whose code in transformers is the text of another library

Indexers = dict[str, IndexerWeights]


@contextmanager
def overridden(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def owner_of(constant: str) -> Any:
    """The module of `indexer/closed_form.ROPE_SHARE`, relative to the optimizer."""
    return import_module("mla2dsa.optimizer." + constant.rsplit(".", 1)[0].replace("/", "."))


@dataclass(frozen=True)
class Setting:
    """How the indexers of a trial are fitted. sequences: of text; schedule: None stops at the closed form."""

    heads: int = 8
    width: int = 24
    rows: int = 128
    sequences: int = CLOSED_FORM_SEQUENCES
    random_share: float = Recipe().random_share
    schedule: DistilSchedule | None = None

    def __str__(self) -> str:
        steps = f"distilled, {self.schedule.steps} steps" if self.schedule else "closed form"
        return f"{steps}, {self.heads} heads of {self.width}, {self.sequences} sequences of {self.rows} rows"


CLOSED = (Setting(), Setting(width=128))
FEWER_HEADS = (Setting(heads=3), Setting(heads=3, width=128))
DISTILLED = (Setting(rows=32, sequences=DISTIL_SEQUENCES, schedule=DistilSchedule(Distil().steps, Distil().lr)),)


@dataclass(frozen=True)
class Layer:
    """One MLA layer's samples, by what they are for. read: its linear maps, read off the graph again; beside: random tokens to
    fit on, too; vocabulary: every token; random: others, which nothing is fitted on."""

    site: MlaSite
    read: Callable[[], SiteMaps]
    maps: SiteMaps
    fitting: list[SiteSample]
    beside: list[SiteSample]
    selection: list[SiteSample]
    vocabulary: list[SiteSample]
    held_out: list[SiteSample]
    random: list[SiteSample]

    @property
    def name(self) -> str:
        return self.site.name


@dataclass(frozen=True)
class Result:
    """recall: of held-out attention mass, mean over layers; loss, kl, foreign (KL): one value a sequence.

    negative: share of random tokens whose head weights sum below zero, worst layer. seconds: of the fit.
    """

    recall: float
    negative: float
    loss: Tensor
    kl: Tensor
    foreign: Tensor
    seconds: float = 0.0


class Remembered:
    """The dense model's outputs, in place of the runner that would compute them again for each trial."""

    def __init__(self, runner: PieceRunner, ids: Tensor) -> None:
        self._logits = list(runner.logits_of([program_inputs(ids)]))

    def logits_of(self, _: object) -> Iterator[Logits]:
        yield from self._logits


def remembered(prepared: Prepared, sequences: Sequence[Tensor]) -> list[Remembered]:
    cores = [change.before for change in prepared.converted.changes]
    load = WeightSource(prepared.checkpoint, prepared.capture).loader(prepared.capture.program)
    runner = PieceRunner(prepared.capture.program, load, cores)
    return [Remembered(runner, ids) for ids in sequences]


@dataclass(eq=False)
class Bench:
    """tiny-mla with everything that trials share. Results are kept by the weights that gave them."""

    prepared: Prepared
    held_out: list[Tensor]
    foreign: list[Tensor]
    training: list[Tensor]
    dense: list[Remembered]
    measured: dict[tuple[Any, ...], Result] = field(default_factory=dict)

    @classmethod
    def open(cls, sequences: int) -> Bench:
        prepared = prepare(str(TINY), read_recipe(None, {"index_topk": TOPK}))
        tokenizer = load_tokenizer(TINY)
        with tempfile.TemporaryDirectory() as folder:
            training = read_tokens(training_text(folder), tokenizer).sequences(LENGTH, DISTIL_SEQUENCES + SELECTION)
            other = Path(folder) / "foreign.txt"
            other.write_text(foreign_text())
            foreign = read_tokens(other, tokenizer).sequences(LENGTH, sequences)
        held_out = read_tokens(TINY / "held_out", tokenizer).sequences(LENGTH, sequences)
        return cls(prepared, held_out, foreign, training, remembered(prepared, held_out + foreign))

    def with_held_out(self, sequences: int) -> Bench:
        """The same with so many held-out sequences, and no others."""
        held_out = read_tokens(TINY / "held_out", load_tokenizer(TINY)).sequences(LENGTH, sequences)
        return Bench(self.prepared, held_out, [], self.training, remembered(self.prepared, held_out))

    @cache  # noqa: B019  (one bench a process)
    def layers(self, seed: int) -> list[Layer]:
        config = self.prepared.plan.indexer
        vocabulary = int(self.prepared.checkpoint.config["vocab_size"])
        noise = random_tokens(2 * LENGTH, vocabulary, seed).sequences(LENGTH)
        step = len(self.training) // SELECTION
        chosen = range(step // 2, step * SELECTION, step)
        fitting = [ids for number, ids in enumerate(self.training) if number not in chosen]
        every = vocabulary_sequences(LENGTH, 1 + len(fitting), vocabulary, seed)
        groups = (fitting, every[1:], [self.training[number] for number in chosen], every[:1], self.held_out, noise)
        source = WeightSource(self.prepared.checkpoint, self.prepared.capture)
        how = Calibration(config, MOST_ROWS, seed=seed)
        layers = []
        for site, samples, maps in layer_samples(source, [ids for group in groups for ids in group], how):
            waiting = iter(samples)
            layers.append(Layer(site, maps, maps(), *([next(waiting) for _ in group] for group in groups)))
        return layers

    @cache  # noqa: B019
    def converted(self, config: IndexerConfig) -> Converted:
        return mla_to_dsa(self.prepared.capture.program, config)

    @cache  # noqa: B019
    def usual(self, setting: Setting, seed: int) -> tuple[Indexers, float]:
        """`fit` with every constant as it is."""
        return self.fit(setting, seed)

    def fit(self, setting: Setting, seed: int) -> tuple[Indexers, float]:
        """Indexers by layer, as `convert` fits them, and the seconds that took."""
        config, layers = IndexerConfig(TOPK, setting.heads, setting.width), self.layers(seed)
        found, start = {}, time.process_time()
        for number, layer in enumerate(layers):
            stride = len(layer.fitting) // setting.sequences
            samples = [thinned(sample, setting.rows) for sample in layer.fitting[:: stride or 1]]
            beside = round(len(samples) * setting.random_share / (1 - setting.random_share))
            samples += [thinned(sample, setting.rows) for sample in layer.beside[:beside]]
            deciding = [thinned(sample, setting.rows) for sample in (*layer.selection, *layer.vocabulary)]
            parts, training = Samples(samples, deciding, layer.vocabulary), NO_TRAINING
            if setting.schedule is not None:
                training = Training(replace(setting.schedule, seed=seed + number), layer_fit.NEAR)
            found[layer.name] = fit(layer.maps, parts, config, training, NOTHING_SPENT).weights
        return found, time.process_time() - start

    def measure(self, setting: Setting, indexers: Indexers, seconds: float, seed: int) -> Result:
        config = IndexerConfig(TOPK, setting.heads, setting.width)
        key = (config, seed, *(float(t.double().sum()) for w in indexers.values() for t in vars(w).values()))
        if key not in self.measured:
            recalls = [
                mean_recall(partial(index_scores, indexers[x.name], config), x.held_out, TOPK)
                for x in self.layers(seed)
            ]
            negative = [
                negative_share(indexers[layer.name].weights_proj.sum(0), layer.random) for layer in self.layers(seed)
            ]
            texts = self.on_texts(config, indexers)
            self.measured[key] = Result(sum(recalls) / len(recalls), max(negative), *texts)
        return replace(self.measured[key], seconds=seconds)

    def on_texts(
        self, config: IndexerConfig, indexers: Indexers, selection: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss increase and KL of each held-out sequence, KL of each foreign one. selection: used in place of sparse_mla."""
        converted = self.converted(config)
        source = WeightSource(self.prepared.checkpoint, self.prepared.capture, indexers=indexers)
        overrides = {SPARSE_MLA: selection} if selection is not None else None
        cores = [change.after for change in converted.changes]
        runner = PieceRunner(converted.program, source.loader(converted.program), cores, overrides)
        found = []
        for dense, ids in zip(self.dense, self.held_out + self.foreign, strict=True):
            result = on_text(dense, {"it": runner}, [ids], TOPK).by_selection["it"]  # type: ignore[arg-type]
            found.append((result.loss_delta, result.kl))
        loss, kl = torch.tensor(found, dtype=torch.float64).unbind(-1)
        own = len(self.held_out)
        return loss[:own], kl[:own], kl[own:]

    def baseline(self, name: str) -> Result:
        """The oracle or the window. Recall by the same rows as the indexers'."""
        indexers, _ = self.usual(CLOSED[0], 0)  # of which nothing is used
        texts = self.on_texts(IndexerConfig(TOPK, CLOSED[0].heads, CLOSED[0].width), indexers, getattr(baselines, name))
        scorer = (
            oracle_scores if name == "oracle" else import_module("mla2dsa.optimizer.indexer.indexer_math").window_scores
        )
        recalls = [mean_recall(scorer, layer.held_out, TOPK) for layer in self.layers(0)]
        return Result(sum(recalls) / len(recalls), 0.0, *texts)


def thinned(sample: SiteSample, rows: int) -> SiteSample:
    """The sample with an even share of its query rows."""
    stride = len(sample.rows) // rows
    if stride < 2:
        return sample
    cut = {name: getattr(sample, name)[::stride].contiguous() for name in ("rows", "query", "mass")}
    return replace(sample, **cut)


def foreign_text(names: Sequence[str] = FOREIGN) -> str:
    import transformers

    models = Path(transformers.__file__).parent / "models"
    return "\n".join((models / name / f"modeling_{name}.py").read_text() for name in names)


def trial(constant: str, value: Any, setting: Setting) -> tuple[Setting, Mapping[str, Any]]:
    """`setting` with the value in it, and what of a module has to be overridden meanwhile."""
    owner, name = constant.rsplit(".", 1)
    if owner in ("DistilSchedule", "Distil"):
        assert setting.schedule is not None
        return replace(setting, schedule=replace(setting.schedule, **{name: value})), {}
    if owner in ("Calibration", "Recipe"):
        return replace(setting, **{name: value}), {}
    if owner == "recipe":
        return replace(setting, sequences=value), {}
    return setting, {"owner": owner_of(constant), "name": name, "value": value}
