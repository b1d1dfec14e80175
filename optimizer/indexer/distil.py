"""Layer-wise distillation: the indexer's softmax learns the dense model's head-mean attention by KL divergence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import UserError
from ...kernels.spec import IndexerConfig, IndexerWeights
from .indexer_math import index_scores
from .samples import SiteSample

BETAS = (0.9, 0.95)  # swept by benchmarks/constants.py
FINAL_RATE = 0.05  # of the peak, reached linearly; swept by benchmarks/constants.py
# Swept by benchmarks/constants.py.
FEW_STEPS = 16  # up to here the peak is capped: too few steps to mend what a high rate breaks
FEW_STEPS_LR = 1e-3  # swept by benchmarks/constants.py
CLIP = 1.0  # gradient norm of the layer; swept by benchmarks/constants.py
ROW_RMS = 0.05  # of every row of wk while training; swept by benchmarks/constants.py
# Swept by benchmarks/constants.py.
SIGN_WEIGHT = 10.0  # nats for a token whose head weights sum to zero instead of SIGN_MARGIN of the mean
SIGN_MARGIN = 0.05  # swept by benchmarks/constants.py
# Fixed by float32's rounding (1e-7): below it a row is zero, and is not scaled up.
ZERO_ROW = 1e-6  # of the largest row's rms
SHORTEST_STEP = 1e-6  # seconds: fixed by the clock's resolution


@dataclass(frozen=True)
class DistilSchedule:
    """steps: so many, one calibration sequence each; lr: peak rate; warmup: steps to reach it, linearly; seed: order of the
    sequences."""

    steps: int
    lr: float = 3e-3  # swept by benchmarks/constants.py
    warmup: int = 8  # swept by benchmarks/constants.py
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0): warm-up, then a line to FINAL_RATE of the peak."""
        peak = min(self.lr, FEW_STEPS_LR) if self.steps <= FEW_STEPS else self.lr
        return peak * min(1.0, (step + 1) / max(1, self.warmup)) * max(FINAL_RATE, 1 - step / self.steps)


@dataclass(frozen=True)
class Distilled:
    """weights: after the last step (float32); losses: mean KL of every step, nats."""

    weights: IndexerWeights
    losses: tuple[float, ...]


def distil(
    start: IndexerWeights,
    config: IndexerConfig,
    samples: Sequence[SiteSample],
    schedule: DistilSchedule,
    on_step: Callable[[int, float], None] | None = None,
) -> Distilled:
    """Trains one layer's indexer on `samples`, one sequence a step, to the end of the schedule.

    Loss: KL(mass || softmax(I)) over all past keys of the sampled rows, DeepSeek-V3.2's warm-up loss; and a hinge on the sum of
    the head weights of every token, which is what keeps seldom tokens from turning the selection round. Adam on wq_b,
    k_norm, weights_proj and wk with its rows brought to equal rms (the closed form's rotary rows are small on purpose),
    folded back at the end. Sequences come in a seeded shuffled order, again and again. The rate falls to the end, so the
    last step is the one to take: what is held out decides whether it is taken at all, not where to stop. The same inputs and
    seed give the same result, bit for bit. on_step(step, loss) is called after every step, from 1.
    Raises UserError if the loss is not finite.
    """
    if not samples:
        raise UserError("distillation needs at least one calibration sequence; none was given")
    student, row_scale = _student(start)
    optimizer, losses = torch.optim.Adam(vars(student).values(), betas=BETAS), list[float]()
    for step, index in enumerate(_order(len(samples), schedule), start=1):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step - 1)
        losses.append(_train(student, row_scale, optimizer, config, samples[index]))
        if on_step is not None:
            on_step(step, losses[-1])
    return Distilled(_detached(_folded(student, row_scale)), tuple(losses))


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
        (loss + SIGN_WEIGHT * sign_hinge(student.weights_proj, sample)).backward()
    norm = torch.nn.utils.clip_grad_norm_(list(vars(student).values()), CLIP)
    if not torch.isfinite(loss) or not torch.isfinite(norm):
        raise UserError("distillation diverged: the loss is not finite; lower the learning rate")
    optimizer.step()
    return float(loss.detach())


def sign_hinge(weights_proj: Tensor, sample: SiteSample) -> Tensor:
    """Mean over tokens of what the sum of the head weights is short of SIGN_MARGIN of its mean size, relative to that; scalar."""
    total = sample.hidden @ weights_proj.sum(0)
    return (SIGN_MARGIN - total / total.detach().abs().mean()).relu().mean()


def divergence(scores: Tensor, mass: Tensor) -> Tensor:
    """Mean over rows of KL(mass || softmax(scores)), scalar. scores, mass: [R, T], -inf and 0 for future keys."""
    logs = scores.log_softmax(-1).masked_fill(mass <= 0, 0.0)
    return (torch.xlogy(mass, mass) - mass * logs).sum(-1).mean()


def seconds_per_step(start: IndexerWeights, config: IndexerConfig, sample: SiteSample) -> float:
    """What a step takes here and now: the second of two, which are thrown away."""
    student, row_scale = _student(start)
    optimizer = torch.optim.Adam(vars(student).values(), lr=0.0, betas=BETAS)
    took = 0.0
    for _ in range(2):
        began = time.monotonic()
        _train(student, row_scale, optimizer, config, sample)
        took = time.monotonic() - began
    return max(took, SHORTEST_STEP)
