"""weights_proj of the closed form: how much each index head counts, times a constant that is read off the hidden state.

`weights_proj` has no bias, so its constant is v . x with v . x ~ 1. Where v . x falls below zero, the scores of that query
change sign and the selection is turned round: on tokens that no calibration text shows, too. So signs are looked at on
sequences that go through the whole vocabulary, and v is mended where some are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from ...kernels.spec import IndexerConfig, IndexerWeights
from .indexer_math import index_features, index_keys, row_blocks
from .nnls import nnls
from .ridge import Ridge
from .samples import SiteSample

# benchmarks/constants.py: with 256 tokens 6% of random tokens have weights below zero, with 4096 or more 0.3%.
ONE_TOKENS = 4096  # tokens the constant one is fitted on at most; as many others measure it
# benchmarks/constants.py: less is the same, 1.0 puts 2% of random tokens below zero.
ONE_RIDGE = 1e-2  # ridge of that fit, relative to the mean square of a hidden channel
# benchmarks/constants.py: from 5 on the same.
ONE_ROUNDS = 20  # of reweighting at most; it usually settles in fewer than ten
# benchmarks/constants.py: 2% of random tokens below zero with the first alone, 0.6% with two, 0.3% with three.
EXCESS_WEIGHTS = (1.0, 0.1, 0.03)  # of an overshoot in that fit, tried in turn while some tokens come out negative
# Swept by benchmarks/constants.py.
MEND_ROUNDS = 12  # of adding the tokens that are still negative to the fit, each time at twice the weight
# Fixed by memory: with those that are fitted, what `plan` counts on (`before/resources.py`).
MOST_MENDED = 3 * ONE_TOKENS  # tokens that are added by it, at most
# benchmarks/constants.py: 0.0002 to 0.2 are alike in KL, 0.2 keeps less mass.
MASS_FLOOR = 0.02  # uniform mass added before the logarithm in the head-weight fit
# benchmarks/constants.py: 0.01 keeps less mass; 1.0 keeps more, and has the lower KL with 24 channels, not with 128.
UNIFORM_SHARE = 0.1  # uniform mass added to the importance of a key in that fit
# benchmarks/constants.py: less is the same; more has the lower KL with 24 channels.
HEAD_RIDGE = 1e-3  # ridge of that fit: equal heads share their weight evenly


@dataclass(frozen=True)
class One:
    """v: [D] float64 with v . x ~ 1. variation: its coefficient, on tokens that it was not fitted on; negative: share of those,
    and of the vocabulary's, that come out below zero (the larger of the two)."""

    v: Tensor
    variation: float
    negative: float


def negative_share(total: Tensor, samples: Sequence[SiteSample]) -> float:
    """Share of the tokens of `samples` whose head weights sum below zero; 0 without any. total: [D], sum of weights_proj's rows."""
    below = tokens = 0
    for sample in samples:
        below += int((sample.hidden @ total.to(sample.hidden) < 0).sum())
        tokens += len(sample.hidden)
    return below / max(1, tokens)


def constant_one(samples: Sequence[SiteSample], vocabulary: Sequence[SiteSample] = ()) -> One:
    """v with v . x ~ 1 on `samples`, and above zero on `vocabulary`, as far as there is such a v.

    Too large only scales a row's scores, below zero inverts them. So where least squares leaves negatives (the first
    layer, whose hidden states are embeddings with little in common), overshoots are weighted down, by reweighted ridge
    regression, as far as it helps on tokens that were not fitted; and where that is not enough, the tokens that are still
    negative are fitted as well.
    """
    stride = max(1, sum(len(sample.hidden) for sample in samples) // (2 * ONE_TOKENS))
    tokens = torch.cat(
        [sample.hidden[::stride].clone() for sample in samples]
    ).double()  # clones: no sample stays mapped
    fitted, others = tokens[0::2], tokens[1::2]
    ridge = Ridge(fitted, float(ONE_RIDGE * fitted.square().sum() / fitted.shape[1]))
    candidates = []
    for excess in EXCESS_WEIGHTS:
        candidates.append(_judged(_expectile(ridge, excess), others, vocabulary))
        if candidates[-1].negative == 0:
            break
    best = min(candidates, key=lambda one: (one.negative, one.variation))
    if best.negative and vocabulary:
        candidates = [best, *_mended(best, ridge, others, vocabulary)]
    return min(candidates, key=lambda one: (one.negative, one.variation))


def _judged(v: Tensor, others: Tensor, vocabulary: Sequence[SiteSample]) -> One:
    read = others @ v
    negative = max(float((read < 0).double().mean()), negative_share(v, vocabulary))
    return One(v, float(read.std() / read.mean()), negative)


def _mended(one: One, ridge: Ridge, others: Tensor, vocabulary: Sequence[SiteSample]) -> list[One]:
    """Fits with the tokens of `vocabulary` that come out negative, at a weight that grows until none does. Where they are as
    many as are fitted, v is no matter of a few tokens, and what they would add takes longer than all else."""
    found = []
    for _ in range(MEND_ROUNDS):
        wrong = torch.cat([s.hidden[s.hidden @ one.v.to(s.hidden) < 0] for s in vocabulary])[:ONE_TOKENS].double()
        if len(wrong) == ONE_TOKENS or ridge.added + len(wrong) > MOST_MENDED:
            break
        ridge.add(wrong)
        one = _judged(_expectile(ridge, EXCESS_WEIGHTS[-1]), others, vocabulary)
        found.append(one)
        if one.negative == 0 or not len(wrong):
            break
    return found


def _expectile(ridge: Ridge, excess: float) -> Tensor:
    """v with v . x ~ 1 where overshoots count `excess` times as much as shortfalls; 1 on average over the tokens."""
    weight = ridge.base
    for _ in range(ONE_ROUNDS):
        one = ridge.solved(weight)
        read = ridge.tokens @ one
        before, weight = weight, ridge.base * torch.where(read < 1, 1.0, excess).to(read)
        if torch.equal(weight, before):
            break
    return one / read.mean()


def head_shares(weights: IndexerWeights, config: IndexerConfig, samples: Sequence[SiteSample]) -> Tensor:
    """a [HI] >= 0: least squares of sum_j a_j feature_j to the log mass, row-centred and weighted by the mass."""
    count = config.index_n_heads
    gram = weights.wk.new_zeros(count, count, dtype=torch.float64)
    moment = weights.wk.new_zeros(count, dtype=torch.float64)
    for sample in samples:
        keys = index_keys(weights, config, sample)
        position = torch.arange(len(keys), device=keys.device)
        where = torch.arange(len(sample.rows), device=keys.device)
        for block in row_blocks(where, 2 * count * len(keys)):
            rows, mass = sample.rows[block], sample.mass[block]
            past = position <= rows[:, None]
            uniform = past / (rows[:, None] + 1.0)
            importance = mass + UNIFORM_SHARE * uniform
            importance = importance / importance.sum(-1, keepdim=True)
            target = torch.where(past, mass + MASS_FLOOR * uniform, 1.0).log()
            target -= (importance * target).sum(-1, keepdim=True)
            features = index_features(weights, config, sample, rows, keys)
            features -= features @ importance[..., None]
            weighted = features * importance[:, None]
            gram += (weighted @ features.mT).double().sum(0)
            moment += (weighted @ target[..., None]).double().sum((0, 2))
    gram.diagonal().add_(HEAD_RIDGE * gram.diagonal().mean())
    shares = nnls(gram, moment)
    if not shares.any():
        raise UserError("the closed form found no index head that follows the attention mass; give other text")
    return shares
