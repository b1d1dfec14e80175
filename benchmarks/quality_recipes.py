"""Part of quality.py: how indexers are fitted to tiny-mla, one ingredient left out at a time, and what that costs on two texts.

A line's IN and OOD are loss increases, KL the same of the KL, all as ratios to the mass oracle's, with the standard error over
sequences; worst: the worst sequence's loss increase to the median of the oracle's; negative: share of random tokens of the whole
vocabulary, in an order that no fit saw, whose head weights sum below zero, in the worst layer; seconds: of the fit alone, CPU
time; layers: c(losed form) or d(istilled), and how much less attention mass than the oracle's it holds on what decides.

Samples of the dense model are gathered once a seed and fitted on by the product's own functions. IN is tiny-mla's held-out
text, OOD the model code of transformers; both are cut into sequences of 1024 tokens, index_topk 64, all layers sparse.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from constants_fits import LENGTH, TOPK, Remembered, foreign_text, overridden, owner_of, remembered
from tiny_text import TINY, training_text
from torch import Tensor

from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.before.resources import MOST_HELD_OUT
from mla2dsa.optimizer.indexer.calibrate import Calibration, layer_samples
from mla2dsa.optimizer.indexer.distil import DistilSchedule
from mla2dsa.optimizer.indexer.head_weights import negative_share
from mla2dsa.optimizer.indexer.indexer_math import random_indexer
from mla2dsa.optimizer.indexer.layer_fit import NEAR, NOTHING_SPENT, Fit, Samples, Training, fit
from mla2dsa.optimizer.indexer.samples import SiteMaps, SiteSample
from mla2dsa.optimizer.model.text import load_tokenizer, read_tokens, vocabulary_sequences
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.optimizer.plan import Prepared, prepare
from mla2dsa.optimizer.proof import baselines
from mla2dsa.optimizer.proof.evaluate import SPARSE_MLA, on_text
from mla2dsa.optimizer.recipe import CLOSED_FORM_SEQUENCES, DISTIL_SEQUENCES, Distil, Recipe, read_recipe
from mla2dsa.passes.mla_to_dsa import mla_to_dsa
from mla2dsa.runtime.execute import PieceRunner

IN, OOD = "IN", "OOD"
# The generated ones open with emojis, whose byte tokens the calibration text has not; the first of all texts is always measured.
FOREIGN = ("deepseek_v3", "llama", "gemma2", "t5", "qwen3_moe", "clip", "mixtral", "whisper")
V3_WIDTH = 24  # 7 of 64 latent channels beside 16 rotary ones and a balance channel; DeepSeek-V3 has 63 of 512
MOST_AUTO = {24: 1.15, 64: 1.10, 128: 1.10}  # times the oracle's loss increase
MOST_CLOSED, MOST_CLOSED_V3 = 1.3, 1.8
MOST_WORST = 3.0  # times the oracle's median
MOST_LOST = 0.1  # of the sequences


@dataclass(frozen=True)
class Variant:
    """A way of fitting. distil: with training; noise: random-token sequences are in the mix; refit: of the rotary rows; mend:
    the vocabulary is looked at for signs; steps: of the training, a layer."""

    name: str
    distil: bool = False
    noise: bool = True
    refit: bool = True
    mend: bool = True
    steps: int = Distil().steps


CLOSED = Variant("closed form")
AUTO = Variant("auto", distil=True)
ABLATIONS = (
    CLOSED,
    replace(CLOSED, name="closed form, no random tokens", noise=False),
    replace(CLOSED, name="closed form, no refit", refit=False),
    replace(CLOSED, name="closed form, neither", noise=False, refit=False),
    replace(CLOSED, name="closed form, signs not mended", mend=False),
    AUTO,
    replace(AUTO, name="auto, no random tokens", noise=False),
    replace(AUTO, name="auto, no refit", refit=False),
    replace(AUTO, name="auto, 256 steps", steps=256),
)


@dataclass(frozen=True)
class Layer:
    name: str
    maps: SiteMaps
    text: Sequence[SiteSample]
    noise: Sequence[SiteSample]
    held_out: Sequence[SiteSample]
    vocabulary: Sequence[SiteSample]
    unseen: Sequence[SiteSample]


@dataclass(frozen=True)
class Measured:
    """Of one text: a value a sequence."""

    loss: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Cell:
    """A variant at one width and seed. negative: share of random tokens of the whole vocabulary, in an order that no fit saw,
    whose head weights sum below zero, in the worst layer. seconds: of the fit, CPU time."""

    fits: Mapping[str, Fit]
    texts: Mapping[str, Measured]
    negative: float
    seconds: float


class Workshop:
    """tiny-mla, its texts, what the dense model says of them and what the oracle makes of them."""

    def __init__(self, sequences: int) -> None:
        self.prepared: Prepared = prepare(str(TINY), read_recipe(None, {"index_topk": TOPK}))
        self.vocabulary = int(self.prepared.checkpoint.config["vocab_size"])
        tokenizer = load_tokenizer(TINY)
        with tempfile.TemporaryDirectory() as folder:
            other = Path(folder) / "foreign.txt"
            other.write_text(foreign_text(FOREIGN))
            self.texts = {
                IN: read_tokens(TINY / "held_out", tokenizer).sequences(LENGTH, sequences),
                OOD: read_tokens(other, tokenizer).sequences(LENGTH, sequences),
            }
            training = read_tokens(training_text(folder), tokenizer)
        self.training = training.sequences(LENGTH, DISTIL_SEQUENCES + MOST_HELD_OUT)
        self.dense: dict[str, list[Remembered]] = {
            name: remembered(self.prepared, ids) for name, ids in self.texts.items()
        }
        self.oracle = self.measure(IndexerConfig(TOPK, 8, 24), {}, baselines.oracle)

    def layers(self, seed: int, random_share: float = Recipe().random_share) -> list[Layer]:
        step = len(self.training) // MOST_HELD_OUT
        chosen = range(step // 2, step * MOST_HELD_OUT, step)
        text = [ids for number, ids in enumerate(self.training) if number not in chosen]
        added = round(len(text) * random_share / (1 - random_share))
        groups = (
            text, vocabulary_sequences(LENGTH, added, self.vocabulary, seed),
            [self.training[number] for number in chosen],
            vocabulary_sequences(LENGTH, 1, self.vocabulary, seed + 1000),
            vocabulary_sequences(LENGTH, 4, self.vocabulary, seed + 2000),
        )  # fmt: skip
        source = WeightSource(self.prepared.checkpoint, self.prepared.capture)
        how = Calibration(self.prepared.plan.indexer, seed=seed)
        found = []
        for site, samples, maps in layer_samples(source, [ids for group in groups for ids in group], how):
            waiting = iter(samples)
            found.append(Layer(site.name, maps(), *([next(waiting) for _ in group] for group in groups)))
        return found

    def cell(self, variant: Variant, width: int, layers: Sequence[Layer], seed: int) -> Cell:
        config, began = IndexerConfig(TOPK, 8, width), time.process_time()
        fits = {layer.name: fitted(variant, config, layer, seed + 100 * n) for n, layer in enumerate(layers)}
        seconds = time.process_time() - began
        negative = max(negative_share(fits[x.name].weights.weights_proj.sum(0), x.unseen) for x in layers)
        return Cell(fits, self.measure(config, {name: one.weights for name, one in fits.items()}), negative, seconds)

    def measure(
        self, config: IndexerConfig, indexers: Mapping[str, IndexerWeights], selection: object = None
    ) -> dict[str, Measured]:
        """selection: used in place of the indexers'."""
        converted = mla_to_dsa(self.prepared.capture.program, config)
        source = WeightSource(
            self.prepared.checkpoint, self.prepared.capture, indexers=indexers or self.untrained(config)
        )
        overrides = {SPARSE_MLA: selection} if selection is not None else None
        cores = [change.after for change in converted.changes]
        runner = PieceRunner(converted.program, source.loader(converted.program), cores, overrides)
        found = {}
        for name, sequences in self.texts.items():
            results = [
                on_text(dense, {"it": runner}, [ids], TOPK).by_selection["it"]  # type: ignore[arg-type]
                for dense, ids in zip(self.dense[name], sequences, strict=True)
            ]
            loss, kl = torch.tensor([(one.loss_delta, one.kl) for one in results], dtype=torch.float64).unbind(-1)
            found[name] = Measured(loss, kl)
        return found

    def untrained(self, config: IndexerConfig) -> dict[str, IndexerWeights]:
        return {
            name: random_indexer(config, dims.hidden_size, dims.q_width) for name, dims in self.prepared.plan.layers
        }


def fitted(variant: Variant, config: IndexerConfig, layer: Layer, seed: int) -> Fit:
    text, noise = layer.text, layer.noise
    if not variant.distil:  # as many as `--indexer closed-form` takes
        text = text[:: len(text) // CLOSED_FORM_SEQUENCES]
        noise = noise[: round(len(noise) * len(text) / len(layer.text))]
    samples = Samples(
        [*text, *(noise if variant.noise else [])], [*layer.held_out, *layer.vocabulary],
        layer.vocabulary if variant.mend else [],
    )  # fmt: skip
    training = Training(DistilSchedule(variant.steps, Distil().lr, seed=seed), NEAR) if variant.distil else Training()
    plain = nullcontext() if variant.refit else overridden(owner_of("indexer/closed_form.X"), "REFIT_ROUNDS", 0)
    with plain:
        return fit(layer.maps, samples, config, training, NOTHING_SPENT)


HEADER = (
    f"{'':34}{'d':>4}{'seed':>5} {'IN':>6}{'+-':>5}{'OOD':>6}{'+-':>5} {'KL IN':>6} {'OOD':>6} {'worst':>6} {'OOD':>6} "
    f"{'negative':>9} {'fit, s':>7}  layers"
)


def ratio(found: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Of the means over sequences, and its standard error by the delta method, a sequence being one observation."""
    value = float(found.mean() / oracle.mean())
    rest = found - value * oracle
    return value, float(rest.std() / len(rest) ** 0.5 / oracle.mean())


def line(name: str, width: int, seed: int, cell: Cell, oracle: Mapping[str, Measured]) -> str:
    (own, own_error), (far, far_error) = (ratio(cell.texts[text].loss, oracle[text].loss) for text in (IN, OOD))
    kl = [float(cell.texts[text].kl.mean() / oracle[text].kl.mean()) for text in (IN, OOD)]
    worst = [float(cell.texts[text].loss.max() / oracle[text].loss.median()) for text in (IN, OOD)]
    layers = " ".join(
        f"{'d' if one.indexer == 'distilled' else 'c'}{one.oracle - one.recall:.4f}" for one in cell.fits.values()
    )
    return (
        f"{name:34}{width:4}{seed:5} {own:6.2f}{own_error:5.2f}{far:6.2f}{far_error:5.2f} {kl[0]:6.2f} {kl[1]:6.2f} "
        f"{worst[0]:6.1f} {worst[1]:6.1f} {cell.negative:9.4%} {cell.seconds:7.1f}  {layers}"
    )


def wins(cell: Cell, other: Cell) -> dict[str, float]:
    """Share of the sequences whose KL is lower than the other's."""
    return {text: float((cell.texts[text].kl < other.texts[text].kl).double().mean()) for text in (IN, OOD)}


def must_hold(width: int, seed: int, cells: Mapping[str, Cell], oracle: Mapping[str, Measured]) -> Iterator[str]:
    """Every figure that is asked for, with its limit, of the cells there are."""
    asked: list[tuple[str, float, float]] = []
    if (auto := cells.get(AUTO.name)) is not None:
        for text in (IN, OOD):
            if width in MOST_AUTO:
                asked.append((f"auto {text}", ratio(auto.texts[text].loss, oracle[text].loss)[0], MOST_AUTO[width]))
            worst = float(auto.texts[text].loss.max() / oracle[text].loss.median())
            asked.append((f"auto {text}, worst sequence", worst, MOST_WORST))
        asked.append(("auto, negative", auto.negative, 0.0))
    if (closed := cells.get(CLOSED.name)) is not None:
        most = MOST_CLOSED_V3 if width == V3_WIDTH else MOST_CLOSED
        asked.append(("closed form OOD", ratio(closed.texts[OOD].loss, oracle[OOD].loss)[0], most))
        asked.append(("closed form, negative", closed.negative, 0.0))
    if auto is not None and closed is not None:
        lost = {text: 1 - share for text, share in wins(auto, closed).items()}
        asked += [(f"auto {text}, higher KL than the closed form", lost[text], MOST_LOST) for text in (IN, OOD)]
    for name, value, limit in asked:
        yield f"  {'holds ' if value <= limit else 'MISSED'} d {width} seed {seed}: {name} {value:.4g}, at most {limit:g}"


def ablations(sequences: int, widths: Sequence[int], seeds: Sequence[int], only: Sequence[str]) -> Iterator[str]:
    shop = Workshop(sequences)
    for text in (IN, OOD):
        oracle = shop.oracle[text]
        yield (
            f"oracle, {text}: loss {float(oracle.loss.mean()):+.4f}, median of the sequences {float(oracle.loss.median()):+.4f}, "
            f"worst {float(oracle.loss.max()):+.4f}, KL {float(oracle.kl.mean()):.4f}, {len(oracle.loss)} sequences"
        )
    yield f"OOD: model code of transformers ({', '.join(FOREIGN)})"
    yield HEADER
    for seed in seeds:
        layers = shop.layers(seed)
        for width in widths:
            cells: dict[str, Cell] = {}
            for variant in ABLATIONS:
                if only and variant.name not in only:
                    continue
                cells[variant.name] = cell = shop.cell(variant, width, layers, seed)
                yield line(variant.name, width, seed, cell, shop.oracle)
            yield from must_hold(width, seed, cells, shop.oracle)
