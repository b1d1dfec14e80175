"""The lightning indexer in plain differentiable maths, the scorers it is measured against, and recall."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ...kernels.spec import K_NORM_EPS, IndexerConfig, IndexerWeights
from .samples import SiteSample

# Swept by benchmarks/constants.py.
BLOCK_ELEMENTS = 1 << 25  # largest [rows, HI, T] block where no gradient is kept: 128 MiB in float32
# benchmarks/constants.py: 0 to 4 cost the same within 3%, 8 and 16 more on foreign text.
SINKS = 4  # first tokens that a sliding window keeps
INIT_STD = 0.02  # fixed by DeepSeek-V3.2's config.json: initializer_range


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = False) -> Tensor:
    """RoPE on the first 2 * cos.shape[-1] channels of x, the rest untouched.

    x: [..., n, d]; cos, sin: [n, dr / 2], zero-width for NoPE. Half-split pairs channel i with i + dr / 2,
    `interleave` pairs 2i with 2i + 1 and keeps that order.
    """
    width = 2 * cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    if interleave:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((pairs.flatten(-2), passed), -1)
    a, b = turned.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, passed), -1)


def index_keys(weights: IndexerWeights, config: IndexerConfig, sample: SiteSample) -> Tensor:
    """The shared key of every token, [T, dI]: RoPE(LayerNorm(wk x))."""
    x = sample.hidden
    gain, bias = weights.k_norm_weight.to(x), weights.k_norm_bias.to(x)
    key = F.layer_norm(x @ weights.wk.to(x).T, (config.index_head_dim,), gain, bias, K_NORM_EPS)
    return rotate(key, sample.cos, sample.sin, config.rope_interleave)


def index_features(
    weights: IndexerWeights, config: IndexerConfig, sample: SiteSample, rows: Tensor, keys: Tensor
) -> Tensor:
    """Each index head's view of each key, [R, HI, T]: ReLU(q . k) * dI^-0.5 * HI^-0.5, future keys included.

    rows: [R] int64 query positions; keys: [T, dI] from `index_keys`.
    """
    heads, dim = config.index_n_heads, config.index_head_dim
    query = sample.q_resid[rows] @ weights.wq_b.to(sample.q_resid).T
    query = query.view(len(rows), heads, dim).transpose(0, 1)
    query = rotate(query, sample.cos[rows], sample.sin[rows], config.rope_interleave).transpose(0, 1)
    query = query * (dim**-0.5 * heads**-0.5)
    return F.relu(query.reshape(-1, dim) @ keys.T, inplace=True).view(len(rows), heads, -1)


def index_scores(
    weights: IndexerWeights, config: IndexerConfig, sample: SiteSample, rows: Tensor | None = None
) -> Tensor:
    """Indexer score I(t, s) = sum_j w_j(x_t) ReLU(q_j . k_s) HI^-0.5 dI^-0.5, [R, T], -inf for future keys.

    The deepseek_v32 indexer without FP8 and Hadamard (which is orthogonal, so leaves q . k alone), in the dtype of
    `sample.hidden` (float32 or float64); weights of another dtype are cast to it. rows: [R] int64 query positions,
    `sample.rows` by default. Differentiable in the weights; keeps one [R, HI, T] block, or without gradients works
    through the rows in blocks of at most BLOCK_ELEMENTS.
    """
    rows = sample.rows if rows is None else rows
    keys = index_keys(weights, config, sample)
    whole = torch.is_grad_enabled()
    blocks = [rows] if whole else row_blocks(rows, config.index_n_heads * len(keys))
    scores = [_score_block(weights, config, sample, block, keys) for block in blocks]
    return scores[0] if len(scores) == 1 else torch.cat(scores)


def row_blocks(rows: Tensor, elements_per_row: int) -> Iterator[Tensor]:
    """`rows` in consecutive pieces, each of at most BLOCK_ELEMENTS elements (and at least one row)."""
    yield from rows.split(max(1, BLOCK_ELEMENTS // elements_per_row))


def _score_block(
    weights: IndexerWeights, config: IndexerConfig, sample: SiteSample, rows: Tensor, keys: Tensor
) -> Tensor:
    features = index_features(weights, config, sample, rows, keys)
    head_weights = sample.hidden[rows] @ weights.weights_proj.to(sample.hidden).T
    return _causal((head_weights[:, None] @ features)[:, 0], rows)


def _causal(scores: Tensor, rows: Tensor) -> Tensor:
    future = torch.arange(scores.shape[-1], device=scores.device) > rows[:, None]
    return scores.masked_fill(future, -torch.inf)


def oracle_scores(sample: SiteSample) -> Tensor:
    """The dense head-mean mass itself, [R, T]: no selector of one set for all heads can capture more of it."""
    return _causal(sample.mass, sample.rows)


def window_scores(sample: SiteSample) -> Tensor:
    """The first SINKS tokens, then the most recent ones, [R, T]: what a sliding window with attention sinks keeps."""
    length = sample.mass.shape[-1]
    recency = torch.arange(length, dtype=sample.mass.dtype, device=sample.mass.device)
    recency[:SINKS] += length
    return _causal(recency.expand(len(sample.rows), length), sample.rows)


def select(scores: Tensor, index_topk: int) -> Tensor:
    """Positions of the index_topk best keys of each row, [R, K] int64; equal scores go to the lowest position.

    ReLU makes exact ties at zero common; this is the tie rule of the `lightning_indexer` op and of ONNX TopK.
    """
    order: Tensor = torch.sort(scores, stable=True, dim=-1, descending=True).indices
    return order[:, :index_topk]


def captured_mass(scores: Tensor, mass: Tensor, index_topk: int, rows: Tensor) -> Tensor:
    """Head-mean dense mass on the selected keys, one value for each row that has more than index_topk keys.

    scores, mass: [R, T]; rows: [R] query positions. Rows with index_topk keys or fewer keep everything and say nothing.
    """
    counted = rows >= index_topk
    return mass[counted].gather(-1, select(scores[counted], index_topk)).sum(-1)


def recall(scores: Tensor, mass: Tensor, index_topk: int, rows: Tensor) -> float:
    """Mean of `captured_mass`: only rows with more than index_topk keys count. UserError if there is none."""
    return mean_captured(captured_mass(scores, mass, index_topk, rows), index_topk)


def mean_recall(scorer: Callable[[SiteSample], Tensor], samples: Sequence[SiteSample], index_topk: int) -> float:
    """`recall` pooled over the rows of all samples. UserError if no row has more than index_topk keys."""
    captured = [captured_mass(scorer(sample), sample.mass, index_topk, sample.rows) for sample in samples]
    return mean_captured(torch.cat(captured) if captured else torch.empty(0), index_topk)


def mean_captured(captured: Tensor, index_topk: int) -> float:
    """UserError if there is none."""
    if not len(captured):
        raise UserError(
            f"recall at index_topk {index_topk} has no query row to look at: every sampled row has at most "
            f"{index_topk} keys; use longer calibration sequences or a smaller index_topk"
        )
    return float(captured.double().mean())


def random_indexer(config: IndexerConfig, hidden_size: int, q_width: int, seed: int = 0) -> IndexerWeights:
    """Untrained indexer: projections N(0, 0.02), k_norm (1, 0), float32; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * INIT_STD
        for name, shape in IndexerWeights.shapes(config, hidden_size, q_width).items()
    }
    tensors["k_norm.weight"] = torch.ones(config.index_head_dim)
    tensors["k_norm.bias"] = torch.zeros(config.index_head_dim)
    return IndexerWeights.from_tensors(tensors)
