"""What a selection of keys costs on text, with errors that count sequences, and the sequence it harms most.

Positions of one sequence share what went wrong in it (one odd token costs all that follow it), so they are no independent
samples: on foreign text an error over positions came out six times too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# benchmarks/memory.py --rows: 256 to 2048 take the same time; of 128K tokens in the vocabulary a block has 128 MiB.
POSITIONS = 256  # whose next-token distributions are compared at once
EXCERPT = 24  # fixed by what fits on two lines: tokens before the one whose loss rose most, and that one
STRETCHES = 24  # fixed by what a plot of a page's width shows
NAN = float("nan")

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Worst:
    """The sequence whose loss a selection raises most, and in it the token that suffers most.

    loss_delta, kl: means of the sequence. position: of the token in the sequence, token_delta: how much its loss rose.
    tokens: those up to it, the last EXCERPT; excerpt: the same as text, empty where there is no tokenizer.
    """

    sequence: int
    loss_delta: float
    kl: float
    position: int
    token_delta: float
    tokens: tuple[int, ...]
    excerpt: str = ""


@dataclass(frozen=True)
class Stretch:
    """Targets at positions first..last of all sequences: means of what a selection costs there."""

    first: int
    last: int
    loss_delta: float
    kl: float


@dataclass(frozen=True)
class Quality:
    """One selection against dense attention, over the positions that have more than index_topk keys.

    loss_delta: nats/token, mean of the paired difference; llama.cpp calls it ln(PPL(Q)/PPL(base)). kl: KL(dense || sparse) of
    the next-token distributions, nats. same_top: share of positions with the same most likely token.
    standard_error, kl_error: over sequences, NaN with one. position_error: of loss_delta, as if positions were independent,
    which is what llama.cpp prints. ppl_ratio: PPL(sparse)/PPL(dense); its error is over sequences.
    sequence_deltas, sequence_kls: means of every sequence. by_position: of STRETCHES equal stretches of positions, the earliest first.
    """

    loss_delta: float
    standard_error: float
    kl: float
    same_top: float
    kl_error: float = NAN
    position_error: float = NAN
    ppl_ratio: float = NAN
    ppl_ratio_error: float = NAN
    sequence_deltas: tuple[float, ...] = ()
    sequence_kls: tuple[float, ...] = ()
    worst: Worst | None = None
    by_position: tuple[Stretch, ...] = ()


@dataclass(frozen=True)
class Tally:
    """Of one selection on one sequence, a value for every judged position."""

    delta: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)

    def add(self, dense: Tensor, sparse: Tensor, targets: Tensor) -> None:
        """dense, sparse: [n, vocab] logarithms of probabilities, of the positions that follow those before; targets: [n]."""
        delta = F.nll_loss(sparse, targets, reduction="none") - F.nll_loss(dense, targets, reduction="none")
        self.delta.append(delta.cpu())
        self.kl.append((dense.exp() * (dense - sparse)).sum(-1).cpu())
        self.same.append((dense.argmax(-1) == sparse.argmax(-1)).float().cpu())


def quality(tallies: Sequence[Tally], sequences: Sequence[Tensor], first: int, decode: Decode | None = None) -> Quality:
    """tallies: of every sequence, which are [L] ids; first: the position of the first judged target."""
    delta = [torch.cat(tally.delta).double() for tally in tallies]
    kl = [torch.cat(tally.kl).double() for tally in tallies]
    same = torch.cat([part for tally in tallies for part in tally.same])
    every = torch.cat(delta)
    mean = float(every.mean())
    error, kl_error = clustered_error(delta), clustered_error(kl)
    ratio = math.exp(mean) if mean < 700 else math.inf  # fixed by what a double holds
    return Quality(
        mean, error, float(torch.cat(kl).mean()), float(same.mean()), kl_error,
        float(every.std() / len(every) ** 0.5) if len(every) > 1 else NAN,
        ratio, ratio * error, _means(delta), _means(kl), _worst(delta, kl, sequences, first, decode),
        _stretches(delta, kl, first),
    )  # fmt: skip


def clustered_error(values: Sequence[Tensor]) -> float:
    """Standard error of the mean over all values, whose sequences are independent and whose positions are not; NaN with one.

    Sequences of different lengths count by their lengths (the sandwich estimate of a ratio of sums).
    """
    count, total = len(values), sum(len(part) for part in values)
    if count < 2 or total == 0:
        return NAN
    mean = float(torch.cat(list(values)).mean())
    residuals = torch.stack([(part - mean).sum() for part in values])
    return float((count / (count - 1) * (residuals**2).sum()).sqrt() / total)


def _stretches(delta: Sequence[Tensor], kl: Sequence[Tensor], first: int) -> tuple[Stretch, ...]:
    longest = max(map(len, delta))
    bounds = sorted({longest * part // STRETCHES for part in range(STRETCHES + 1)})
    found = []
    for begin, end in pairwise(bounds):
        here = [torch.cat([part[begin:end] for part in values]).mean() for values in (delta, kl)]
        found.append(Stretch(first + begin, first + end - 1, *map(float, here)))
    return tuple(found)


def _means(values: Sequence[Tensor]) -> tuple[float, ...]:
    return tuple(float(part.mean()) for part in values)


def _worst(
    delta: Sequence[Tensor], kl: Sequence[Tensor], sequences: Sequence[Tensor], first: int, decode: Decode | None
) -> Worst:
    """NaN is worse than any number: it is what has to be found."""
    means = torch.tensor(_means(delta)).nan_to_num(nan=math.inf)
    number = int(means.argmax())
    at = int(delta[number].nan_to_num(nan=math.inf).argmax())
    end = first + at + 1
    tokens = tuple(sequences[number][max(0, end - EXCERPT) : end].tolist())
    found = (
        number,
        float(delta[number].mean()),
        float(kl[number].mean()),
        first + at,
        float(delta[number][at]),
        tokens,
    )
    worst = Worst(*found)
    return worst if decode is None else replace(worst, excerpt=decode(tokens))


def blocks(first: int, end: int) -> Iterator[slice]:
    """Positions first..end-1, a few at a time."""
    for start in range(first, end, POSITIONS):
        yield slice(start, min(start + POSITIONS, end))


def log_probabilities(logits: Tensor) -> Tensor:
    """[N, vocab] in float32."""
    return torch.log_softmax(logits.float(), -1)
