"""Other values of the constants that steer calibration and verification, on examples/tiny-mla: what each costs or gains.

    python benchmarks/constants.py                            # everything, more than 20 minutes of CPU time
    python benchmarks/constants.py --only ROPE_SHARE lr       # some; --list: which there are
    python benchmarks/constants.py --sequences 16 --seeds 0 1 2

Fits are made by the product's own functions, with one constant at another value; ">" marks the value in use. Text: held
out (tiny-mla's held_out) and foreign (model code of the transformers package), index_topk 64, all layers sparse at once.
Closed forms are given at two widths of the index key: 24 has DeepSeek-V3's proportion (7 of 64 latent channels), 128 holds
the whole latent. "d KL" is the difference of KL to the value in use, mean and standard error over pairs of sequences;
"negative" the share of random tokens whose head weights sum below zero (for them the selection is turned round), in the
worst layer; seconds are of CPU time. The verdict "better" is given where KL is lower by more than two standard errors on
one text and not higher on the other. For limits of the verification: what good conversions reach, and the nearest faults.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import constants_limits as limits
import torch
from constants_fits import CLOSED, DISTILLED, FEWER_HEADS, Bench, Result, Setting, overridden, owner_of, trial
from torch import Tensor

from mla2dsa.optimizer.indexer.calibrate import Calibration
from mla2dsa.optimizer.indexer.distil import DistilSchedule
from mla2dsa.optimizer.recipe import Distil, Recipe


@dataclass(frozen=True)
class Sweep:
    """A constant, other values of it, and the settings it is swept in."""

    constant: str
    others: tuple[Any, ...]
    settings: tuple[Setting, ...] = CLOSED

    @property
    def chosen(self) -> Any:
        """The value in use."""
        owner, name = self.constant.rsplit(".", 1)
        fields: dict[str, Any] = {
            "DistilSchedule": DistilSchedule(1), "Distil": Distil(), "Calibration": Calibration, "Recipe": Recipe()
        }  # fmt: skip
        return getattr(fields[owner] if owner in fields else owner_of(self.constant), name)

    @property
    def values(self) -> list[Any]:
        return sorted({*self.others, self.chosen})


def short(steps: int) -> tuple[Setting, ...]:
    return tuple(replace(one, schedule=DistilSchedule(steps, Distil().lr)) for one in DISTILLED)


FITS = (
    Sweep("indexer/closed_form.ROPE_SHARE", (0.03, 0.3, 1.0)),
    Sweep("indexer/closed_form.DIVISOR_SHARE", (1.0, 4.0, 16.0, 256.0)),
    Sweep("indexer/closed_form.EIGEN_FLOOR", (1e-8, 1e-6, 1e-2)),
    Sweep("indexer/closed_form.REFIT_ROUNDS", (0, 1, 4)),
    Sweep("indexer/closed_form.REFIT_RIDGE", (1e-4, 1e-3, 1e-1)),
    Sweep("indexer/closed_form.REFIT_TOKENS", (1024, 8192)),
    Sweep("indexer/head_weights.ONE_TOKENS", (256, 1024, 16384)),
    Sweep("indexer/head_weights.ONE_RIDGE", (1e-4, 1e-1, 1.0)),
    Sweep("indexer/head_weights.ONE_ROUNDS", (1, 5, 40)),
    Sweep("indexer/head_weights.EXCESS_WEIGHTS", ((1.0,), (1.0, 0.1), (0.03,))),
    Sweep("indexer/head_weights.MEND_ROUNDS", (0, 3)),
    Sweep("indexer/head_weights.MASS_FLOOR", (0.0002, 0.002, 0.2)),
    Sweep("indexer/head_weights.UNIFORM_SHARE", (0.0, 0.01, 1.0)),
    Sweep("indexer/head_weights.HEAD_RIDGE", (1e-6, 0.1, 1.0)),
    Sweep("indexer/head_groups.CLUSTER_ROWS", (16, 1024), FEWER_HEADS),
    Sweep("indexer/indexer_math.BLOCK_ELEMENTS", (1 << 18, 1 << 22)),
    Sweep("Calibration.rows", (16, 32, 64)),
    Sweep("recipe.CLOSED_FORM_SEQUENCES", (1, 4, 64)),
    Sweep("Distil.lr", (1e-3, 1e-2), DISTILLED),
    Sweep("Distil.steps", (256, 2048), DISTILLED),
    Sweep("recipe.DISTIL_SEQUENCES", (16, 32), DISTILLED),
    Sweep("DistilSchedule.warmup", (1, 32), DISTILLED),
    Sweep("indexer/distil.BETAS", ((0.9, 0.9), (0.9, 0.999)), DISTILLED),
    Sweep("indexer/distil.FINAL_RATE", (0.01, 1.0), DISTILLED),
    Sweep("indexer/distil.CLIP", (0.1, 10.0), DISTILLED),
    Sweep("indexer/distil.ROW_RMS", (0.015, 0.15), DISTILLED),
    Sweep("indexer/distil.SIGN_WEIGHT", (0.0, 1.0, 100.0), DISTILLED),
    Sweep("indexer/distil.SIGN_MARGIN", (0.0, 0.2), DISTILLED),
    Sweep("indexer/layer_fit.NEAR", (0.0, 0.01), DISTILLED),
    Sweep("Recipe.random_share", (0.0, 0.1, 0.5), (*CLOSED, *DISTILLED)),
    Sweep("indexer/distil.FEW_STEPS_LR", (3e-4, 3e-3), short(16)),
    Sweep("indexer/distil.FEW_STEPS", (8, 32), short(32)),  # 32: the peak of 32 steps is capped
)
HEADER = (
    f"{'':3}{'value':>18} {'recall':>7} {'loss+':>8} {'KL':>7} {'d KL':>9} {'+-':>7} "
    f"{'foreign KL':>11} {'d KL':>9} {'+-':>7} {'negative':>9} {'':6}"
)
TIMED = {"BLOCK_ELEMENTS", "rows", "steps", "CLOSED_FORM_SEQUENCES", "DISTIL_SEQUENCES"}  # what they cost is time


def swept(bench: Bench, sweep: Sweep, setting: Setting, seeds: Sequence[int]) -> dict[Any, Result]:
    """Results by value; sequences of all seeds one after the other."""
    found = {}
    for value in sweep.values:
        changed, override = trial(sweep.constant, value, setting)
        results = []
        for seed in seeds:
            if value == sweep.chosen:
                indexers, seconds = bench.usual(setting, seed)
            else:
                with overridden(**override) if override else nullcontext():
                    indexers, seconds = bench.fit(changed, seed)
            results.append(bench.measure(changed, indexers, seconds, seed))
        found[value] = pooled(results)
    return found


def pooled(results: Sequence[Result]) -> Result:
    def mean(name: str) -> float:
        return sum(getattr(result, name) for result in results) / len(results)

    texts = (torch.cat([getattr(result, name) for result in results]) for name in ("loss", "kl", "foreign"))
    return Result(mean("recall"), max(result.negative for result in results), *texts, mean("seconds"))


def paired(values: Tensor, chosen: Tensor) -> tuple[float, float]:
    """Mean difference and its standard error over sequences."""
    gap = values - chosen
    return float(gap.mean()), float(gap.std() / len(gap) ** 0.5)


def line(label: str, result: Result, chosen: Result) -> tuple[str, bool]:
    """A row of the table, and whether it is better than the chosen value's."""
    (own, own_error), (far, far_error) = paired(result.kl, chosen.kl), paired(result.foreign, chosen.foreign)
    better = (own < -2 * own_error and far < far_error) or (far < -2 * far_error and own < own_error)
    text = (
        f"{result.recall:7.4f} {float(result.loss.mean()):+8.4f} {float(result.kl.mean()):7.4f} {own:+9.5f} {own_error:7.5f} "
        f"{float(result.foreign.mean()):11.4f} {far:+9.5f} {far_error:7.5f} {result.negative:9.4f}"
    )
    return f"{label:>21} {text} {'better' if better else '':6}", better


def fits(bench: Bench, sweep: Sweep, seeds: Sequence[int], better: list[str]) -> Iterator[str]:
    for setting in sweep.settings:
        yield f"\n{sweep.constant}: {setting}"
        timed = sweep.constant.rsplit(".", 1)[1] in TIMED
        yield f"{HEADER} {'fit, s':>7}" if timed else HEADER.rstrip()
        results = swept(bench, sweep, setting, seeds)
        for value, result in results.items():
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
            row, is_better = line(f"{'> ' if value == sweep.chosen else ''}{shown}", result, results[sweep.chosen])
            yield f"{row} {result.seconds:7.1f}" if timed else row.rstrip()
            if is_better:
                better.append(f"{sweep.constant} {shown} ({setting})")


def references(bench: Bench) -> Iterator[str]:
    yield "\nwhat to compare with"
    yield HEADER.rstrip()
    oracle = bench.baseline("oracle")
    for name, result in (("oracle", oracle), ("window", bench.baseline("window"))):
        yield line(name, result, oracle)[0].rstrip()


CHECKS: dict[str, Callable[..., Iterator[str]]] = {
    "_UNIT": limits.unit,
    "TOLERANCE": limits.maps,
    "CHECKED_ROWS": limits.maps,
    "SINKS": limits.sinks,
    "sequences": limits.proof_size,
    "GRAPH_TOLERANCE": limits.limits,
    "TRANSFORMERS_TOLERANCE": limits.limits,
    "max_loss_delta": limits.limits,
    "SHORT": limits.lengths,
    "PARITY_SEQUENCES": limits.lengths,
}
SWEEPS = {sweep.constant.rsplit(".", 1)[1]: sweep for sweep in FITS}


def report(args: argparse.Namespace) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.open(args.sequences)
        tokens = len(bench.held_out[0])
        yield f"{args.sequences} held-out and {args.sequences} foreign sequences of {tokens} tokens, seeds {args.seeds}"
        yield from references(bench)
        better: list[str] = []
        for name in args.only:
            if name in SWEEPS:
                yield from fits(bench, SWEEPS[name], args.seeds, better)
        for check in dict.fromkeys(CHECKS[name] for name in args.only if name in CHECKS):
            needs_folder = check in (limits.limits, limits.lengths)
            yield from partial(check, work=Path(folder))(bench) if needs_folder else check(bench)
        yield f"\nbetter than the value in use: {'; '.join(better) or 'none'}"
        yield f"{time.process_time() / 60:.0f} minutes of CPU time"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (entry.split(":")[1].strip() for entry in lines if entry.startswith("model name")), platform.processor()
    )
    amx = "with AMX" if any("amx_tile" in entry for entry in lines) else "without AMX"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    cores = torch.multiprocessing.cpu_count()
    return f"{cores}-core {platform.machine()}, {model} {amx}, {torch.get_num_threads()} thread, {versions}"


def main() -> None:
    names = [*SWEEPS, *CHECKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CONSTANT")
    parser.add_argument("--list", action="store_true", help="the names of the constants, one a line")
    parser.add_argument("--sequences", type=int, default=4, metavar="N", help="of each text (default 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.list:
        print("\n".join(names))
        return
    if args.sequences < 2:
        parser.error("--sequences: at least 2, for a standard error")
    torch.set_num_threads(args.threads)
    print(machine())
    for text in report(args):
        print(text, flush=True)


if __name__ == "__main__":
    main()
