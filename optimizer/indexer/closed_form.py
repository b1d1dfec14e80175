"""A lightning indexer written down from the MLA weights and second moments of a few sequences, with no training.

Absorbed MLA is attention with one shared key [c, k_rope]; the indexer is ReLU attention with one shared, narrower key.
So each index head takes the logit of one MLA head (or the mean of a cluster of them), with c replaced by its best
low-rank image. What stands in the way is the LayerNorm on the index key, which centres and divides by the deviation.
A *balance* channel holding minus the sum of the others makes the centring a no-op, and orthonormal latent rows make
the deviation follow rms(latent @ x), so that the LayerNorm repeats what the latent norm does. The fewer rows there are, the less
it does; then a *divisor* channel, large beside the others, makes the deviation: v . x ~ rms(latent @ x), as far as a hidden state tells
that linearly. Both ways are tried, and the one is taken whose selection captures more attention mass. The rotary key has no norm
in the dense model: its rows are fitted so that they come out right after the division.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import UserError
from ...kernels.spec import K_NORM_EPS, IndexerConfig, IndexerWeights
from .head_groups import head_groups
from .head_weights import constant_one, head_shares
from .indexer_math import index_scores, mean_recall
from .ridge import regression
from .samples import SiteMaps, SiteSample

# benchmarks/constants.py: 0.03 to 0.3 are alike with 128 channels; with 24 more keeps more mass, with 128 1.0 keeps less.
ROPE_SHARE = 0.1  # scale of the rope rows in wk, undone by k_norm.weight: keeps k_rope out of the deviation
# benchmarks/constants.py: from 16 on alike.
DIVISOR_SHARE = 64.0  # energy of the divisor channel, relative to that of the rotary and latent channels together
# benchmarks/constants.py: 1e-8 to 1e-2 are alike.
EIGEN_FLOOR = 1e-4  # smallest eigenvalue of a moment, relative to the largest: few tokens say little about the rest
# Swept by benchmarks/constants.py.
REFIT_ROUNDS = 2  # of fitting the rotary rows: each changes the divisor that it was made for
REFIT_RIDGE = (
    1e-2  # towards the rows before, relative to the mean square of a hidden channel; swept by benchmarks/constants.py
)
# Swept by benchmarks/constants.py.
REFIT_TOKENS = 32768  # that fit is made on at most, evenly spread
# Fixed by what a divisor is a mean over: of a token with a hundredth of the usual it would be a hundred times the usual. Texts have
# none: hidden states are normed, but for rows of zeros, or nearly, that an embedding has for tokens no training showed.
FAINT = 0.1  # of the rms of a latent, the median of a sequence: tokens below it say nothing of what the LayerNorm divides by
# Fixed by memory: of DeepSeek-V3's hidden states so many take 56 MiB in float64.
REFIT_PIECE = 1024  # tokens at once


@dataclass(frozen=True)
class ClosedFormStats:
    """How well a layer fits the construction.

    energy: share of the query-key energy (squared singular values) carried by the kept latent channels; 1 is all.
    layernorm_cv: coefficient of variation over tokens of the LayerNorm's divisor relative to the latent norm's.
    rope_cv: coefficient of variation of the divisor itself, which the rotary channels would need constant.
    one_cv: coefficient of variation of the constant 1 that weights_proj reads off the hidden state, on tokens it was
        not fitted on. It scales all scores of a query row alike: training feels it, the selection does not.
    one_negative: share of those tokens, or of those that go through the vocabulary, where it came out below zero, which would
        turn the selection round.
    divisor: whether a channel makes the LayerNorm's divisor.
    """

    energy: float
    layernorm_cv: float
    rope_cv: float
    one_cv: float
    one_negative: float
    divisor: bool


@dataclass(frozen=True)
class ClosedForm:
    """weights: float32; heads: the MLA heads each index head stands for (a partition when HI <= H). start: the form without a divisor
    channel, to train from: a step on so loud a row shakes the mean of all channels (benchmarks/results/quality.txt)."""

    weights: IndexerWeights
    start: IndexerWeights
    stats: ClosedFormStats
    heads: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Moments:
    """float64, of the latent y after its norm but before its gain (so q . c = gain q . y), over the tokens that have one.

    query: [R, R] head-mean E[(gain q)(gain q)^T]; mean: [R] and covariance: [R, R] of y; norm: [N] 1 / rms(latent @ x).
    taken: by sample, [T] which tokens have one.
    """

    query: Tensor
    mean: Tensor
    covariance: Tensor
    norm: Tensor
    taken: tuple[Tensor, ...]


@torch.no_grad()
def closed_form(
    maps: SiteMaps, samples: Sequence[SiteSample], config: IndexerConfig, vocabulary: Sequence[SiteSample] = ()
) -> ClosedForm:
    """The indexer of one layer whose scores follow sum_h a_h ReLU(logit_h) with a_h >= 0.

    vocabulary: samples of sequences that go through the whole vocabulary, where head weights have to stay above zero.

    Takes min(dI - dr - 1, kv_lora_rank) latent channels, or one less where a divisor channel takes its place: with
    dI >= dr + 2 + kv_lora_rank nothing is cut away, and channels beyond that stay zero. The LayerNorm leaves wk's scale free;
    it is chosen so that the mean variance of wk x is 1, where the epsilon of 1e-6 is negligible and entries are far from the ends
    of any float format.
    Linear algebra in float64 on the device of `maps`; nothing of size tokens x heads x rank is ever built.
    Raises UserError if the index head is too narrow, for fewer than two tokens, or for samples that are not finite, or zero.
    """
    if sum(len(sample.hidden) for sample in samples) < 2:
        raise UserError("the closed form needs calibration sequences of at least two tokens in all")
    widths = _latent_widths(maps, config)
    moments, one = _moments(maps, samples), constant_one(samples, vocabulary)
    heads = head_groups(samples, config.index_n_heads)

    def built(width: int, divisor: Tensor | None) -> ClosedForm:
        key_rows, query_map, energy = _key_basis(moments, width)
        keyed, layernorm_cv, rope_cv = _key_side(maps, samples, config, key_rows, moments, divisor)
        weights = IndexerWeights(
            wq_b=_query_side(maps, config, heads, query_map * maps.latent_gain.double()),
            weights_proj=one.v.float().expand(config.index_n_heads, -1),
            **keyed,
        )
        weights = _in_layout(weights, config, len(maps.k_rope))
        share = head_shares(weights, config, samples)
        weights = replace(weights, weights_proj=(share[:, None] * one.v).float())
        stats = ClosedFormStats(energy, layernorm_cv, rope_cv, one.variation, one.negative, divisor is not None)
        return ClosedForm(weights, weights, stats, heads)

    plain = built(widths[0], None)
    divisor = _divisor(maps, samples) if len(widths) > 1 else None
    if divisor is None or not _energy(divisor[None], samples) > 0:
        return plain
    return replace(_best([plain, built(widths[1], divisor)], config, samples), start=plain.weights)


def _best(found: Sequence[ClosedForm], config: IndexerConfig, samples: Sequence[SiteSample]) -> ClosedForm:
    """The one that captures most attention mass; of equals the first."""

    def captured(one: ClosedForm) -> float:
        return mean_recall(lambda sample: index_scores(one.weights, config, sample), samples, config.index_topk)

    return max(found, key=captured)


def _latent_widths(maps: SiteMaps, config: IndexerConfig) -> list[int]:
    """Latent channels without a divisor channel, and with one where there is room for it."""
    rope, rank = len(maps.k_rope), len(maps.latent)
    if config.index_head_dim < rope + 2:
        raise UserError(
            f"index_head_dim {config.index_head_dim} is too narrow: with qk_rope_head_dim {rope} the closed form needs "
            f"at least {rope + 2} (the rotary channels, a balance channel and a latent channel)"
        )
    room = config.index_head_dim - rope - 1
    return [min(width, rank) for width in (room, room - 1) if width > 0]


def _moments(maps: SiteMaps, samples: Sequence[SiteSample]) -> _Moments:
    rank, q_width = maps.q_absorbed.shape[1:]
    total = maps.latent.new_zeros(rank, dtype=torch.float64)
    square = maps.latent.new_zeros(rank, rank, dtype=torch.float64)
    resid = maps.latent.new_zeros(q_width, q_width, dtype=torch.float64)
    norms, taken = [], []
    for sample in samples:
        latent, q_resid = maps.raw_latent(sample.hidden).double(), sample.q_resid.double()
        energy = latent.square().mean(-1)
        taken.append(~(energy <= FAINT**2 * energy.median()))  # NaN is found below
        if not bool(taken[-1].all()):
            latent, q_resid = latent[taken[-1]], q_resid[taken[-1]]
        norm = maps.latent_norm(latent)
        normed = latent * norm[:, None]
        total += normed.sum(0)
        square += normed.T @ normed
        resid += q_resid.T @ q_resid
        norms.append(norm)
    if not (count := sum(map(len, norms))):
        raise UserError(
            "its hidden states, or their latents, are zero on all calibration sequences; look at the weights before it"
        )
    query = torch.zeros_like(square)
    for absorbed in maps.q_absorbed:  # head by head: E[(A u)(A u)^T] = A E[u u^T] A^T
        head = absorbed.double() * maps.latent_gain.double()[:, None]
        query += head @ (resid / count) @ head.T / len(maps.q_absorbed)
    mean = total / count
    covariance = square / count - torch.outer(mean, mean)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (query, mean, covariance, *norms)):
        raise UserError("the calibration sequences hold values that are not finite; run the dense model in float32")
    return _Moments(query, mean, covariance, torch.cat(norms), tuple(taken))


def _key_basis(moments: _Moments, width: int) -> tuple[Tensor, Tensor, float]:
    """Orthonormal key rows K [m, R] and query map Q [m, R] with (Q q) . (K y) ~ q . y, and the energy kept.

    The best rank-m bilinear form under the two moments: with the SVD of query^1/2 covariance^1/2 = U S V^T, keys
    V_m^T covariance^-1/2 y against queries V_m^T covariance^1/2 q; then rewritten for orthonormal key rows.
    """
    query_root, _ = _roots(moments.query)
    key_root, key_inverse_root = _roots(moments.covariance)
    _, singular, right = torch.linalg.svd(query_root @ key_root)
    energy = float(singular[:width].square().sum() / singular.square().sum())
    basis, upper = torch.linalg.qr((right[:width] @ key_inverse_root).T)
    turn = _levelling(basis.T @ (moments.covariance + torch.outer(moments.mean, moments.mean)) @ basis)
    return turn @ basis.T, turn @ upper @ right[:width] @ key_root, energy


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    roots = values.clamp_min(EIGEN_FLOOR * float(values[-1])).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _levelling(moment: Tensor) -> Tensor:
    """Rotation [m, m] after which the channel sum is the direction of least energy, so the balance channel is small.

    Eigenvectors (least first), then the Householder reflection that takes the first axis to the all-ones direction.
    """
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors.T
    normal = torch.full_like(vectors[0], len(vectors) ** -0.5)
    normal[0] -= 1
    size = normal.square().sum()
    return vectors - torch.outer(normal, normal @ vectors) * (2 / size) if size > 0 else vectors


def _key_side(
    maps: SiteMaps,
    samples: Sequence[SiteSample],
    config: IndexerConfig,
    key_rows: Tensor,
    moments: _Moments,
    divisor: Tensor | None,
) -> tuple[dict[str, Tensor], float, float]:
    """wk, k_norm_weight and k_norm_bias (float32), and the two variations the LayerNorm leaves behind."""
    rope, dim = len(maps.k_rope), config.index_head_dim
    end, balance = rope + len(key_rows), rope + len(key_rows) + (divisor is not None)
    wk = maps.latent.new_zeros(dim, maps.latent.shape[1], dtype=torch.float64)
    wk[:rope] = ROPE_SHARE * maps.k_rope.double()
    wk[rope:end] = key_rows @ maps.latent.double()
    if divisor is not None:
        wk[end] = divisor * (DIVISOR_SHARE * _energy(wk, samples) / _energy(divisor[None], samples)) ** 0.5
    wk[balance] = -wk[:balance].sum(0)
    rows = wk.to(samples[0].hidden).T
    variance = torch.cat(
        [(s.hidden @ rows).double().square().mean(-1)[taken] for s, taken in zip(samples, moments.taken, strict=True)]
    )
    wk *= variance.mean().rsqrt()
    divided = variance.rsqrt()
    relative = divided / moments.norm
    gain, bias = torch.ones_like(wk[:, 0]), torch.zeros_like(wk[:, 0])
    gain[:rope] = divided.mean() / divided.square().mean() / ROPE_SHARE  # least squares, as the next line
    gain[rope:end] = relative.mean() / relative.square().mean()
    bias[rope:end] = -(key_rows @ moments.mean)  # centred keys: a query's constant would only move its ReLU threshold
    if maps.latent_bias is not None:  # wk has none: what the norm makes of it in the mean
        bias[rope:end] += key_rows @ maps.latent_bias.double() * moments.norm.mean()
    if maps.k_rope_bias is not None:
        bias[:rope] = maps.k_rope_bias.double()
    wk = _refitted(wk, gain[:rope], maps, samples, balance)
    if divisor is not None:  # no louder than the others: FP8 has one scale for all channels of a key
        gain[end : balance + 1] = DIVISOR_SHARE**-0.5
    tensors = {"wk": wk.float(), "k_norm_weight": gain.float(), "k_norm_bias": bias.float()}
    return tensors, _variation(relative), _variation(divided)


def _energy(rows: Tensor, samples: Sequence[SiteSample]) -> float:
    """Of what `rows` [n, D] make of the hidden states, all tokens together."""
    rows = rows.to(samples[0].hidden)
    return float(sum((sample.hidden @ rows.T).double().square().sum() for sample in samples))


def _divisor(maps: SiteMaps, samples: Sequence[SiteSample]) -> Tensor:
    """v [D] with v . x ~ rms(latent @ x), by its error relative to that."""

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for x in _pieces(samples):
            latent = maps.raw_latent(x).double()
            energy = latent.square().mean(-1)
            taken = energy > FAINT**2 * energy.median()
            yield (x.double() * maps.latent_norm(latent)[:, None])[taken], torch.ones_like(energy[taken, None])

    return _fitted(pairs(), samples)[0]


def _refitted(wk: Tensor, gain: Tensor, maps: SiteMaps, samples: Sequence[SiteSample], balance: int) -> Tensor:
    """wk with rotary rows W for which gain * W x / sigma comes closest to k_rope x, sigma = rms(wk x) being what LayerNorm
    divides by; mean variance 1 as before. gain: [dr]; balance: the row that holds minus the sum of the others.

    Ridge towards the rows as they are: [sum (k_rope x) x^T / (gain sigma) + lambda W] [sum x x^T / sigma^2 + lambda]^-1.
    """
    if not (rope := len(gain)):
        return wk
    for _ in range(REFIT_ROUNDS):
        wk = wk.clone()
        wk[:rope] += _fitted((_divided(wk, gain, maps.k_rope.double(), x) for x in _pieces(samples)), samples)
        wk[balance] = 0
        wk[balance] = -wk.sum(0)
    variance = torch.cat([(x.double() @ wk.T).square().mean(-1) for x in _pieces(samples)])
    return wk * variance.mean().rsqrt()


def _divided(wk: Tensor, gain: Tensor, k_rope: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """x / sigma [N, D], and what the rotary rows leave of k_rope x / gain there [N, dr]. float64."""
    x = x.double()
    divided = x * ((x @ wk.T).square().mean(-1, keepdim=True) + K_NORM_EPS).rsqrt()
    return divided, x @ (k_rope / gain[:, None]).T - divided @ wk[: len(gain)].T


def _stride(samples: Sequence[SiteSample]) -> int:
    return max(1, sum(len(sample.hidden) for sample in samples) // REFIT_TOKENS)


def _pieces(samples: Sequence[SiteSample]) -> Iterator[Tensor]:
    """Hidden states [N, D] of the tokens that rows are fitted on; no sample stays mapped."""
    stride = _stride(samples)
    for number, sample in enumerate(samples):
        yield from sample.hidden[number % stride :: stride].split(REFIT_PIECE)


def _fitted(pairs: Iterable[tuple[Tensor, Tensor]], samples: Sequence[SiteSample]) -> Tensor:
    """Rows W [n, D] with W a ~ b. pairs: a [N, D] and b [N, n] of each of `_pieces`, float64."""
    few = sum(len(sample.hidden) for sample in samples) // _stride(samples) < samples[0].hidden.shape[1]
    return regression(pairs, REFIT_RIDGE, few)


def _variation(values: Tensor) -> float:
    return float(values.std() / values.mean())


def _query_side(maps: SiteMaps, config: IndexerConfig, heads: tuple[tuple[int, ...], ...], query_map: Tensor) -> Tensor:
    """wq_b [HI * dI, Rq] float32: the mean query of each group, scaled so that q . k dI^-0.5 HI^-0.5 is its logit."""
    rope, dim = len(maps.k_rope), config.index_head_dim
    end = rope + len(query_map)
    factor = maps.scale * (dim * config.index_n_heads) ** 0.5
    wq_b = maps.q_rope.new_zeros(config.index_n_heads, dim, maps.q_rope.shape[-1], dtype=torch.float32)
    for head, group in zip(wq_b, heads, strict=True):
        members = list(group)
        head[:rope] = factor * maps.q_rope[members].mean(0)
        head[rope:end] = factor * (query_map @ maps.q_absorbed[members].mean(0).double())
    return wq_b.flatten(0, 1)


def _in_layout(weights: IndexerWeights, config: IndexerConfig, rope: int) -> IndexerWeights:
    """The same indexer with its rotary channels in the configured order (they are half-split as built)."""
    if not config.rope_interleave:
        return weights
    dim = config.index_head_dim
    order = torch.arange(dim, device=weights.wk.device)
    order[:rope] = order[:rope].view(2, -1).T.flatten()
    return replace(
        weights,
        wq_b=weights.wq_b.view(-1, dim, weights.wq_b.shape[-1])[:, order].flatten(0, 1),
        wk=weights.wk[order],
        k_norm_weight=weights.k_norm_weight[order],
        k_norm_bias=weights.k_norm_bias[order],
    )
