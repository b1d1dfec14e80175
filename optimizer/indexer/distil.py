"""Layer-wise distillation: the indexer's softmax learns the dense model's head-mean attention by KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import UserError
from ...kernels.spec import IndexerConfig, IndexerWeights
from .indexer_math import index_scores, mean_recall, oracle_scores
from .samples import SiteSample

BETAS = (0.9, 0.95)  # swept by benchmarks/constants.py
FINAL_RATE = 0.05  # of the peak, reached linearly; swept by benchmarks/constants.py
# Swept by benchmarks/constants.py.
FEW_STEPS = 16  # up to here the peak is capped: too few steps to mend what a high rate breaks
FEW_STEPS_LR = 1e-3  # swept by benchmarks/constants.py
CLIP = 1.0  # gradient norm of the layer; swept by benchmarks/constants.py
ROW_RMS = 0.05  # of every row of wk while training; swept by benchmarks/constants.py
# Fixed by float32's rounding (1e-7): below it a row is zero, and is not scaled up.
ZERO_ROW = 1e-6  # of the largest row's rms
# Swept by benchmarks/constants.py.
PLATEAU_STEPS = 64  # recall has settled when its best gained less than PLATEAU_GAIN over this many steps
PLATEAU_GAIN = 0.002  # swept by benchmarks/constants.py
# Swept by benchmarks/constants.py.
COOL_STEPS = 32  # then the rate falls over this many steps before the end: a high rate alone hides half the gain
# Swept by benchmarks/constants.py.
ORACLE_MARGIN = 0.001  # there is nothing left to learn this close to the oracle's recall


@dataclass(frozen=True)
class DistilSchedule:
    """steps: at most so many, one calibration sequence each; lr: peak rate; warmup: steps to reach it, linearly;
    eval_every: steps between looks at the held-out recall; seed: order of the sequences."""

    steps: int
    lr: float = 3e-3  # swept by benchmarks/constants.py
    warmup: int = 8  # swept by benchmarks/constants.py
    eval_every: int = 16  # swept by benchmarks/constants.py
    seed: int = 0

    def rate(self, step: int, plateau: int | None = None) -> float:
        """Learning rate of a step (from 0): warm-up, then a line to FINAL_RATE of the peak, steeper from `plateau`."""
        peak = min(self.lr, FEW_STEPS_LR) if self.steps <= FEW_STEPS else self.lr
        if plateau is not None:
            left = max(0.0, 1 - (step - plateau) / COOL_STEPS)
            return FINAL_RATE * peak + left * (self.rate(plateau) - FINAL_RATE * peak)
        return peak * min(1.0, (step + 1) / max(1, self.warmup)) * max(FINAL_RATE, 1 - step / self.steps)


@dataclass(frozen=True)
class CurvePoint:
    """One look at the held-out sequences: after `step` steps, with the mean KL since the look before (nan at 0)."""

    step: int
    loss: float
    recall: float


@dataclass(frozen=True)
class Distilled:
    """weights: the best snapshot (float32), the start itself if nothing beat it.

    recall_best: held out, at index_topk; steps: how many were taken, fewer than scheduled where recall settled; curve: from
    the start on.
    """

    weights: IndexerWeights
    recall_best: float
    steps: int
    curve: tuple[CurvePoint, ...]


def distil(
    start: IndexerWeights,
    config: IndexerConfig,
    samples: Sequence[SiteSample],
    held_out: Sequence[SiteSample],
    schedule: DistilSchedule,
    on_step: Callable[[int, float], None] | None = None,
) -> Distilled:
    """Trains one layer's indexer on `samples`, one sequence a step, keeping the best snapshot by held-out recall.

    Loss: KL(mass || softmax(I)) over all past keys of the sampled rows, DeepSeek-V3.2's warm-up loss. Adam on wq_b,
    k_norm, weights_proj and wk with its rows brought to equal rms (the closed form's rotary rows are small on purpose),
    folded back at the end. Sequences come in a seeded shuffled order, again and again. Recall, not the loss, decides:
    the KL also measures temperature and tail, which top-k ignores. Ends early when recall reaches the oracle's, or
    COOL_STEPS after it settled. The same inputs and seed give the same result, bit for bit.
    on_step(step, loss) is called after every step, from 1.
    Raises UserError if the loss is not finite, or if no held-out row has more than index_topk keys.
    """
    if not samples:
        raise UserError("distillation needs at least one calibration sequence; none was given")
    oracle = mean_recall(oracle_scores, held_out, config.index_topk)
    seen, plateau, end = _Course(start, _held_out_recall(start, config, held_out)), None, schedule.steps
    student, row_scale = _student(start)
    optimizer, losses = torch.optim.Adam(vars(student).values(), betas=BETAS), list[float]()
    for step, index in enumerate(_order(len(samples), schedule), start=1):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step - 1, plateau)
        losses.append(_train(student, row_scale, optimizer, config, samples[index]))
        if on_step is not None:
            on_step(step, losses[-1])
        if step % schedule.eval_every and step != end:
            continue
        snapshot = _detached(_folded(student, row_scale))
        seen.add(step, sum(losses) / len(losses), snapshot, _held_out_recall(snapshot, config, held_out))
        losses.clear()
        if plateau is None and _settled(seen.curve):
            plateau, end = step, min(end, step + COOL_STEPS)
        if step == end or seen.curve[-1].recall >= oracle - ORACLE_MARGIN:
            break
    return seen.result()


class _Course:
    """The curve so far, and the best snapshot on it: the earliest of equals."""

    def __init__(self, start: IndexerWeights, recall: float) -> None:
        self.curve = [CurvePoint(0, math.nan, recall)]
        self._best = start

    def add(self, step: int, loss: float, snapshot: IndexerWeights, recall: float) -> None:
        if recall > max(point.recall for point in self.curve):
            self._best = snapshot
        self.curve.append(CurvePoint(step, loss, recall))

    def result(self) -> Distilled:
        best = max(point.recall for point in self.curve)
        return Distilled(_detached(self._best), best, self.curve[-1].step, tuple(self.curve))


def _order(count: int, schedule: DistilSchedule) -> Iterator[int]:
    """Index of the sequence of each step: seeded permutations of all `count`, one after the other."""
    generator = torch.Generator().manual_seed(schedule.seed)
    for step in range(schedule.steps):
        if step % count == 0:
            permutation = torch.randperm(count, generator=generator).tolist()
        yield permutation[step % count]


def _student(start: IndexerWeights) -> tuple[IndexerWeights, Tensor]:
    """Trainable copy with wk's rows at ROW_RMS, and the scale [dI, 1] that undoes it. Zero rows stay zero."""
    copy = IndexerWeights(**{name: tensor.detach().float().clone() for name, tensor in vars(start).items()})
    rms = copy.wk.square().mean(-1, keepdim=True).sqrt()
    row_scale = rms.clamp_min(ZERO_ROW * float(rms.max())) / ROW_RMS
    copy = replace(copy, wk=copy.wk / row_scale)
    for tensor in vars(copy).values():
        tensor.requires_grad_()
    return copy, row_scale


def _folded(student: IndexerWeights, row_scale: Tensor) -> IndexerWeights:
    return replace(student, wk=student.wk * row_scale)


def _detached(weights: IndexerWeights) -> IndexerWeights:
    return IndexerWeights(**{name: tensor.detach().float().clone() for name, tensor in vars(weights).items()})


def _train(
    student: IndexerWeights,
    row_scale: Tensor,
    optimizer: torch.optim.Optimizer,
    config: IndexerConfig,
    sample: SiteSample,
) -> float:
    with torch.enable_grad():
        loss = divergence(index_scores(_folded(student, row_scale), config, sample), sample.mass)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(vars(student).values()), CLIP)
    if not torch.isfinite(loss) or not torch.isfinite(norm):
        raise UserError("distillation diverged: the loss is not finite; lower the learning rate")
    optimizer.step()
    return float(loss.detach())


def divergence(scores: Tensor, mass: Tensor) -> Tensor:
    """Mean over rows of KL(mass || softmax(scores)), scalar. scores, mass: [R, T], -inf and 0 for future keys."""
    logs = scores.log_softmax(-1).masked_fill(mass <= 0, 0.0)
    return (torch.xlogy(mass, mass) - mass * logs).sum(-1).mean()


def _held_out_recall(weights: IndexerWeights, config: IndexerConfig, held_out: Sequence[SiteSample]) -> float:
    with torch.no_grad():
        return mean_recall(lambda sample: index_scores(weights, config, sample), held_out, config.index_topk)


def _settled(curve: Sequence[CurvePoint]) -> bool:
    before = [point.recall for point in curve if point.step <= curve[-1].step - PLATEAU_STEPS]
    return bool(before) and max(point.recall for point in curve) < max(before) + PLATEAU_GAIN
