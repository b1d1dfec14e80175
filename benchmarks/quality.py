"""What each way of choosing index_topk keys costs a converted model on held-out text, beside the dense model.

    python benchmarks/quality.py                       # examples/tiny-mla at 1024 tokens, index_topk 64, 8 index heads
    python benchmarks/quality.py --sequences 8         # a quick look
    python benchmarks/quality.py --recipes             # tiny-mla: ingredients on and off, widths, two texts, three seeds (hours)
    python benchmarks/quality.py --recipes --widths 24 64 --seeds 0 --variants auto "closed form"
    python benchmarks/quality.py --model FOLDER --text held_out.txt --calibration train.txt --index-topk 512

All layers are sparse at once. Loss, KL and same-top are over the positions that have more than index_topk keys; recall is
the head-mean dense attention mass that is kept, the mean over layers. `closed-form` and `auto` are calibrated as
`mla2dsa convert` would by default (16 and 64 sequences of text, a third as many of random tokens beside); `random` is an
indexer that was never fitted, `chance` draws keys at random, `window` keeps the last index_topk - 4 keys and the first 4,
`oracle` those with the most dense attention.
Without --calibration the text is the part of the running Python's library that tiny-mla was trained on.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tiny_text import TINY, training_text
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.before.resources import MOST_HELD_OUT, checking_sequences
from mla2dsa.optimizer.indexer.calibrate import Calibration, calibrate, layer_samples
from mla2dsa.optimizer.indexer.distil import DistilSchedule
from mla2dsa.optimizer.indexer.indexer_math import (
    index_scores,
    mean_recall,
    oracle_scores,
    random_indexer,
    window_scores,
)
from mla2dsa.optimizer.indexer.layer_fit import NEAR, NO_TRAINING, Training
from mla2dsa.optimizer.indexer.samples import SiteSample
from mla2dsa.optimizer.model.text import Tokens, load_tokenizer, read_tokens, vocabulary_sequences, vocabulary_size
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.optimizer.plan import Prepared, prepare
from mla2dsa.optimizer.proof import baselines
from mla2dsa.optimizer.proof.evaluate import SPARSE_MLA, TextResult, on_text
from mla2dsa.optimizer.proof.figures import Quality
from mla2dsa.optimizer.recipe import CLOSED_FORM_SEQUENCES, DISTIL_SEQUENCES, Recipe, read_recipe
from mla2dsa.runtime.execute import PieceRunner

ORDER = ("oracle", "auto", "closed-form", "window", "random", "chance")
BASELINES = {"oracle": baselines.oracle, "window": baselines.window, "chance": baselines.chance}

Indexers = Mapping[str, IndexerWeights]  # of one selection, by layer
Scorer = Callable[[SiteSample], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table. recall: mean over layers; seconds: of its calibration, 0 where there is none."""

    selection: str
    quality: Quality
    recall: float
    seconds: float


def fitted(
    prepared: Prepared, text: Tokens, length: int, recipe: Recipe
) -> tuple[dict[str, Indexers], dict[str, float]]:
    """Indexers of every selection that has some, and the seconds their calibration took."""
    config = prepared.plan.indexer
    training = Training(DistilSchedule(recipe.distil.steps, recipe.distil.lr, seed=recipe.seed), NEAR)
    seconds: dict[str, float] = {}
    found: dict[str, Indexers] = {
        "random": {
            name: random_indexer(config, dims.hidden_size, dims.q_width, seed)
            for seed, (name, dims) in enumerate(prepared.plan.layers)
        }
    }
    for name, count, plan in (
        ("closed-form", CLOSED_FORM_SEQUENCES, NO_TRAINING),
        ("auto", DISTIL_SEQUENCES, training),
    ):
        start = time.perf_counter()
        sequences = text.sequences(length, count + MOST_HELD_OUT)
        found[name] = calibrated(prepared, sequences, Calibration(config, recipe.rows, plan, recipe.seed), recipe)
        seconds[name] = time.perf_counter() - start
    return found, seconds


def calibrated(prepared: Prepared, sequences: list[Tensor], how: Calibration, recipe: Recipe) -> Indexers:
    """As `convert` does: MOST_HELD_OUT of the sequences, spread over them, decide what is taken; the rest are fitted on."""
    step = len(sequences) // MOST_HELD_OUT
    selection = range(step // 2, step * MOST_HELD_OUT, step)
    rest = [ids for number, ids in enumerate(sequences) if number not in selection]
    source, size = WeightSource(prepared.checkpoint, prepared.capture), vocabulary_size(prepared.checkpoint)
    length, share = len(sequences[0]), recipe.random_share / (1 - recipe.random_share)
    checking, beside = checking_sequences(size, length), round(len(rest) * share)
    random = vocabulary_sequences(length, checking + beside, size, how.seed)
    deciding = [sequences[number] for number in selection] + random[: round(len(selection) * share)]
    results = calibrate(source, rest + random[checking:], deciding, how, vocabulary=random[:checking])
    return {result.name: result.weights for result in results}


def text_quality(prepared: Prepared, indexers: Mapping[str, Indexers], held_out: list[Tensor]) -> TextResult:
    """Every selection as the same converted program: other indexers, or the selection replaced by a baseline's."""
    checkpoint, capture, converted = prepared.checkpoint, prepared.capture, prepared.converted
    cores = [change.after for change in converted.changes]
    runners = {}
    for name in ORDER:
        source = WeightSource(checkpoint, capture, indexers=indexers.get(name, indexers["random"]))
        overrides = {SPARSE_MLA: BASELINES[name]} if name in BASELINES else None
        runners[name] = PieceRunner(converted.program, source.loader(converted.program), cores, overrides)
    load = WeightSource(checkpoint, capture).loader(capture.program)
    dense = PieceRunner(capture.program, load, [change.before for change in converted.changes])
    return on_text(dense, runners, held_out, prepared.plan.indexer.index_topk)


def recalls(prepared: Prepared, indexers: Mapping[str, Indexers], held_out: list[Tensor]) -> dict[str, float]:
    """Mean over layers of the dense attention mass each selection keeps, on the dense model's hidden states."""
    config = prepared.plan.indexer
    source = WeightSource(prepared.checkpoint, prepared.capture)
    totals = dict.fromkeys(ORDER, 0.0)
    for site, samples, _ in layer_samples(source, held_out, Calibration(config)):
        for name, scorer in scorers(config, {kind: weights[site.name] for kind, weights in indexers.items()}):
            totals[name] += mean_recall(scorer, samples, config.index_topk) / len(prepared.plan.layers)
    return totals


def scorers(config: IndexerConfig, indexers: Mapping[str, IndexerWeights]) -> Iterator[tuple[str, Scorer]]:
    yield from (("oracle", oracle_scores), ("window", window_scores), ("chance", chance_scores))
    yield from ((name, partial(index_scores, weights, config)) for name, weights in indexers.items())


def chance_scores(sample: SiteSample) -> Tensor:
    """Random scores of the past keys, [R, T]."""
    scores = torch.rand(sample.mass.shape, generator=torch.Generator().manual_seed(len(sample.hidden)))
    future = torch.arange(scores.shape[-1]) > sample.rows[:, None]
    return scores.masked_fill(future, -torch.inf)


def measure(args: argparse.Namespace) -> tuple[TextResult, list[Row]]:
    flags = {name: getattr(args, name) for name in ("index_topk", "index_n_heads", "seed")}
    recipe = read_recipe(None, flags)
    prepared = prepare(str(args.model), recipe)
    tokenizer = load_tokenizer(prepared.checkpoint.path)
    held_out = read_tokens(args.text, tokenizer).sequences(args.length, args.sequences)
    with tempfile.TemporaryDirectory() as folder:
        text = read_tokens(args.calibration or training_text(folder), tokenizer)
    indexers, seconds = fitted(prepared, text, args.length, recipe)
    result = text_quality(prepared, indexers, held_out)
    mass = recalls(prepared, indexers, held_out)
    return result, [Row(name, result.by_selection[name], mass[name], seconds.get(name, 0.0)) for name in ORDER]


def machine() -> dict[str, str | int]:
    return {
        "machine": platform.machine(), "cores": torch.multiprocessing.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def read_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY, metavar="MODEL", help="folder or hub id (default: examples/tiny-mla)")
    parser.add_argument("--text", default=TINY / "held_out", metavar="PATH", help="held-out text (default: tiny-mla's)")
    parser.add_argument(
        "--calibration", metavar="PATH", help="text to calibrate on (default: tiny-mla's training text)"
    )
    parser.add_argument("--index-topk", type=int, default=64, metavar="N")
    parser.add_argument("--index-n-heads", type=int, default=8, metavar="N")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, metavar="N", help="held-out sequences (default: all there are)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    recipes = parser.add_argument_group("recipes")
    recipes.add_argument("--recipes", action="store_true", help="compare ways of fitting indexers to tiny-mla")
    recipes.add_argument("--widths", type=int, nargs="+", default=[24, 64, 32, 128], metavar="D", help="index_head_dim")
    recipes.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    recipes.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="default: all")
    return parser, parser.parse_args()


def main() -> None:
    parser, args = read_arguments()
    torch.set_num_threads(args.threads)
    if args.recipes:
        from quality_recipes import ablations

        print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
        for text in ablations(args.sequences or 48, args.widths, args.seeds, args.variants):
            print(text, flush=True)
        return
    try:
        result, rows = measure(args)
    except UserError as error:
        parser.exit(error.exit_code, f"{error}\n")
    if args.json:
        setting = {key: str(val) if isinstance(val, Path) else val for key, val in vars(args).items() if key != "json"}
        found = {"text": asdict(result), "rows": [asdict(row) for row in rows]}
        print(json.dumps({"machine": machine(), "setting": setting, **found}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"{args.model}: {result.positions} positions in sequences of {result.length} tokens")
    print(
        f"index_topk {args.index_topk}, {args.index_n_heads} index heads; dense loss {result.dense_loss:.4f} nats/token"
    )
    print(f"{'selection':12} {'loss delta':>10} {'+-':>7} {'KL':>8} {'same top':>9} {'recall':>7} {'fit, s':>7}")
    for row in rows:
        q = row.quality
        loss = f"{q.loss_delta:+10.4f} {q.standard_error:7.4f} {q.kl:8.4f}"
        print(f"{row.selection:12} {loss} {q.same_top:9.4f} {row.recall:7.4f} {row.seconds:7.1f}")


if __name__ == "__main__":
    main()
