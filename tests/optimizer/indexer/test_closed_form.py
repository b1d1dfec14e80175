"""The closed-form indexer: exact where it has the room, sound where it has not, and what its pieces promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from comparing import close
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_layer import MlaLayer, make_layer
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer import closed_form as closed_form_module
from mla2dsa.optimizer.indexer import head_weights
from mla2dsa.optimizer.indexer.closed_form import closed_form
from mla2dsa.optimizer.indexer.head_groups import head_groups
from mla2dsa.optimizer.indexer.indexer_math import (
    index_keys,
    index_scores,
    mean_recall,
    oracle_scores,
    random_indexer,
    window_scores,
)
from mla2dsa.optimizer.indexer.nnls import nnls
from mla2dsa.optimizer.indexer.ridge import regression
from mla2dsa.optimizer.indexer.samples import SiteSample

LAYER = make_layer()
CALIBRATION = [LAYER.sample(seed, length=192) for seed in range(4)]
HELD_OUT = [LAYER.sample(seed, length=192) for seed in range(10, 13)]
TOPK = 24
WIDE = 8 + 1 + 32  # rotary channels, balance, the whole latent


def indexer_recall(weights: IndexerWeights, config: IndexerConfig, samples: list[SiteSample] = HELD_OUT) -> float:
    with torch.no_grad():
        return mean_recall(lambda sample: index_scores(weights, config, sample), samples, config.index_topk)


def relu_readout(layer: MlaLayer, samples: list[SiteSample], shares: Tensor) -> Callable[[SiteSample], Tensor]:
    """sum_h a_h ReLU(logit_h), with the mean key's part taken out of the logits as k_norm.bias does."""
    rank = len(layer.latent)
    mean = torch.cat([sample.key[:, :rank] for sample in samples]).mean(0)

    def scores(sample: SiteSample) -> Tensor:
        key = sample.key.clone()
        key[:, :rank] -= mean
        logits = layer.scale * sample.query @ key.T
        total = (shares[:, None] * logits.relu()).sum(1)
        return total.masked_fill(torch.arange(len(key)) > sample.rows[:, None], -torch.inf)

    return scores


@pytest.mark.parametrize("dim", [WIDE, 64], ids=["dI=dr+1+R", "dI=64"])
@pytest.mark.parametrize("rope_dim", [8, 0], ids=["rope", "nope"])
def test_with_room_for_the_latent_it_is_the_relu_readout(dim: int, rope_dim: int) -> None:
    layer = make_layer(rope_dim=rope_dim)
    samples, held_out = [layer.sample(s, length=192) for s in range(4)], [layer.sample(10, length=192)]
    config = IndexerConfig(TOPK, 8, dim)
    result = closed_form(layer.maps(), samples, config)
    assert result.stats.energy == pytest.approx(1)
    shares = result.weights.weights_proj.norm(dim=-1)
    weighted = relu_readout(layer, samples, shares)
    assert indexer_recall(result.weights, config, held_out) == pytest.approx(
        mean_recall(weighted, held_out, TOPK), abs=0.005 if rope_dim else 0.002
    )
    plain = relu_readout(layer, samples, torch.ones(8))
    assert indexer_recall(result.weights, config, held_out) >= mean_recall(plain, held_out, TOPK) - 0.01
    past = torch.arange(192) <= held_out[0].rows[:, None]
    with torch.no_grad():
        built = index_scores(result.weights, config, held_out[0])
    pairs = torch.stack((built[past], weighted(held_out[0])[past]))
    assert torch.corrcoef(pairs)[0, 1] > 0.97


def test_stands_between_random_and_oracle() -> None:
    config = IndexerConfig(TOPK, 8, 24)
    built = indexer_recall(closed_form(LAYER.maps(), CALIBRATION, config).weights, config)
    assert built <= mean_recall(oracle_scores, HELD_OUT, TOPK)
    assert built > mean_recall(window_scores, HELD_OUT, TOPK) + 0.05
    assert built > indexer_recall(random_indexer(config, 64, 48), config) + 0.05


@pytest.mark.parametrize(
    ("heads", "dim", "rope_dim"),
    [(8, 24, 8), (8, 10, 8), (8, 96, 8), (3, 24, 8), (1, 24, 8), (20, 24, 8), (8, 16, 0)],
    ids=["8x24", "8x10 one latent channel", "8x96 spare channels", "3x24", "1x24", "20x24", "8x16 nope"],
)
def test_shapes_types_and_channels(heads: int, dim: int, rope_dim: int) -> None:
    layer = make_layer(rope_dim=rope_dim)
    config = IndexerConfig(TOPK, heads, dim)
    result = closed_form(layer.maps(), [layer.sample(s) for s in range(3)], config)
    tensors = result.weights.tensors()
    assert {n: tuple(t.shape) for n, t in tensors.items()} == IndexerWeights.shapes(config, 64, 48)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    divisor = int(result.stats.divisor)
    latent = min(dim - rope_dim - 1 - divisor, 32)
    query = result.weights.wq_b.view(heads, dim, 48)
    assert query[:, rope_dim + latent :].abs().max() == 0  # the divisor and balance channels, and what is left over
    assert query[:, : rope_dim + latent].abs().amax((0, 2)).min() > 0
    if dim > rope_dim + latent + 1 + divisor:
        assert result.weights.wk[rope_dim + latent + 1 + divisor :].abs().max() == 0
    assert 0 < result.stats.energy <= 1 + 1e-9


@pytest.mark.parametrize("dim", [10, 24, 64])
def test_layernorm_neither_centres_nor_sees_epsilon(dim: int) -> None:
    wk = closed_form(LAYER.maps(), CALIBRATION, IndexerConfig(TOPK, 8, dim)).weights.wk
    keys = torch.cat([sample.hidden for sample in CALIBRATION]) @ wk.T
    assert (keys.mean(-1).abs() < 1e-5).all()
    assert keys.var(-1, correction=0).mean() == pytest.approx(1, rel=1e-4)
    assert keys.var(-1, correction=0).min() > 1e-3  # epsilon is 1e-6


def test_bfloat16_rounding_is_harmless() -> None:
    config = IndexerConfig(TOPK, 8, 24)
    weights = closed_form(LAYER.maps(), CALIBRATION, config).weights
    rounded = IndexerWeights(**{name: tensor.bfloat16().float() for name, tensor in vars(weights).items()})
    assert indexer_recall(rounded, config) == pytest.approx(indexer_recall(weights, config), abs=0.003)


def test_rotary_layouts_score_alike() -> None:
    half, inter = (IndexerConfig(TOPK, 8, 24, rope_interleave=layout) for layout in (False, True))
    built = [closed_form(LAYER.maps(), CALIBRATION, config).weights for config in (half, inter)]
    assert not torch.equal(built[0].wk, built[1].wk)
    scores = [index_scores(w, c, HELD_OUT[0]) for w, c in zip(built, (half, inter), strict=True)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_energy_is_that_of_the_best_bilinear_form() -> None:
    """Against the singular values of all absorbed queries times all centred keys, with no moments in between."""
    layer = make_layer(dtype=torch.float64)
    samples = [layer.sample(seed, length=96, rows=torch.arange(96)) for seed in range(3)]
    queries = torch.cat([sample.query[..., :32].flatten(0, 1) for sample in samples])
    keys = torch.cat([sample.key[:, :32] for sample in samples])
    energies = torch.linalg.svdvals(queries @ (keys - keys.mean(0)).T).square()
    for m in (1, 4, 12, 33):
        stats = closed_form(layer.maps(), samples, IndexerConfig(TOPK, 8, 9 + m)).stats
        kept = energies[: m - stats.divisor]
        assert stats.energy == pytest.approx(float(kept.sum() / energies.sum()), rel=1e-3)


def test_narrow_key_holds_the_best_channels() -> None:
    """Without rope the logits (before ReLU) miss what no key of that width can hold, and what LayerNorm varies by."""
    layer = make_layer(rope_dim=0, dtype=torch.float64)
    samples = [layer.sample(seed, length=192, rows=torch.arange(192)) for seed in range(4)]
    config = IndexerConfig(TOPK, 8, 17)
    result = closed_form(layer.maps(), samples, config)
    mean = torch.cat([sample.key for sample in samples]).mean(0)
    errors, total = 0.0, 0.0
    for sample in samples:
        query = (sample.q_resid @ result.weights.wq_b.double().T).view(192, 8, 17)
        built = query @ index_keys(result.weights, config, sample).T * (8 * 17) ** -0.5
        exact = layer.scale * sample.query @ (sample.key - mean).T
        errors += float((built - exact).square().sum())
        total += float(exact.square().sum())
    cut = 1 - result.stats.energy  # Eckart and Young: the least error of any form of this rank
    assert cut - 1e-3 < errors / total < 1.2 * (cut + result.stats.layernorm_cv**2)


def test_scores_stay_the_right_way_round() -> None:
    result = closed_form(LAYER.maps(), CALIBRATION, IndexerConfig(TOPK, 8, 24))
    assert result.stats.one_negative == 0
    assert result.stats.one_cv < 0.3
    head_weights = torch.cat([sample.hidden for sample in HELD_OUT]) @ result.weights.weights_proj.T
    assert (head_weights >= 0).double().mean() > 0.999


@pytest.mark.parametrize(
    ("hidden", "vocabulary", "better"),
    [(64, 200, True), (1024, 200, False), (64, 0, False), (1024, 0, True)],
    ids=["D=64 embeddings", "D=1024 embeddings", "D=64 no token twice", "D=1024 no token twice"],
)
def test_constant_one_seldom_turns_negative_where_hidden_states_share_little(
    hidden: int, vocabulary: int, better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(hidden=hidden)
    layer = replace(layer, common=0.15 * layer.common)
    samples = [layer.sample(seed, length=400, vocabulary=vocabulary) for seed in range(3)]
    config = IndexerConfig(TOPK, 8, 24)
    leaning = closed_form(layer.maps(), samples, config).stats
    monkeypatch.setattr(head_weights, "EXCESS_WEIGHTS", (1.0,))
    even = closed_form(layer.maps(), samples, config).stats
    if better:
        assert leaning.one_negative < 0.7 * even.one_negative
    else:
        assert leaning == even


def rotary_error(weights: IndexerWeights, layer: MlaLayer, samples: list[SiteSample]) -> float:
    """How far the rotary channels after the LayerNorm are from the dense model's rotary key, relative."""
    hidden = torch.cat([sample.hidden for sample in samples])
    wanted = hidden @ layer.k_rope.T
    normed = torch.nn.functional.layer_norm(
        hidden @ weights.wk.T, weights.wk.shape[:1], weights.k_norm_weight, weights.k_norm_bias
    )
    return float((normed[:, : len(layer.k_rope)] - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("hidden", "seeds", "better"),
    [(64, range(10, 13), 0.95), (1024, range(4), 0.8)],
    ids=["tokens > D, held out", "tokens < D, fitted on"],
)
def test_rotary_rows_are_fitted_to_what_the_layernorm_makes_of_them(
    hidden: int, seeds: range, better: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(hidden=hidden)
    samples, measured = ([layer.sample(seed, length=192) for seed in some] for some in (range(4), seeds))
    config, errors = IndexerConfig(TOPK, 8, 12), []
    for rounds in (0, 1, 2):
        monkeypatch.setattr(closed_form_module, "REFIT_ROUNDS", rounds)
        weights = closed_form(layer.maps(), samples, config).weights
        errors.append(rotary_error(weights, layer, measured))
    assert errors[1] < better * errors[0]
    assert errors[2] <= errors[1] * 1.05


def test_both_ways_of_fitting_the_rotary_rows_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a moment of channels, or of tokens; in pieces of any size; by all tokens, or an even share of them."""
    layer = make_layer(dtype=torch.float64)
    samples, config = [layer.sample(seed, length=192) for seed in range(4)], IndexerConfig(TOPK, 8, 24)
    primal = closed_form(layer.maps(), samples, config).weights.wk
    monkeypatch.setattr(closed_form_module, "REFIT_PIECE", 50)
    torch.testing.assert_close(closed_form(layer.maps(), samples, config).weights.wk, primal)
    monkeypatch.setattr(closed_form_module, "regression", lambda pairs, ridge, _: regression(pairs, ridge, few=True))
    torch.testing.assert_close(closed_form(layer.maps(), samples, config).weights.wk, primal)
    monkeypatch.setattr(closed_form_module, "REFIT_TOKENS", 384)
    half = closed_form(layer.maps(), samples, config).weights.wk
    assert 0 < (half - primal).norm() < 0.2 * primal.norm()


def test_as_many_heads_stand_for_themselves_and_more_begin_again() -> None:
    assert head_groups(CALIBRATION, 8) == tuple((head,) for head in range(8))
    assert head_groups(CALIBRATION, 11)[8:] == ((0,), (1,), (2,))
    few, many = (IndexerConfig(TOPK, heads, 24) for heads in (8, 16))
    once = closed_form(LAYER.maps(), CALIBRATION, few).weights
    twice = closed_form(LAYER.maps(), CALIBRATION, many).weights
    assert indexer_recall(twice, many) == pytest.approx(indexer_recall(once, few), abs=0.003)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 8), seed=st.integers(0, 50))
def test_head_groups_are_a_partition(count: int, seed: int) -> None:
    groups = head_groups([make_layer(seed=seed).sample(0, length=32)], count)
    assert len(groups) == count
    assert sorted(head for group in groups for head in group) == list(range(8))


def test_heads_that_look_alike_are_grouped() -> None:
    layer = make_layer(heads=6)
    twins = [0, 1, 2, 0, 1, 2]
    layer = replace(layer, q_nope=layer.q_nope[twins], q_rope=layer.q_rope[twins], up_k=layer.up_k[twins])
    generator = torch.Generator().manual_seed(0)
    layer = replace(layer, q_nope=layer.q_nope + 0.05 * torch.randn(layer.q_nope.shape, generator=generator))
    samples = [layer.sample(seed) for seed in range(2)]
    assert head_groups(samples, 3) == ((0, 3), (1, 4), (2, 5))
    config = IndexerConfig(TOPK, 3, 24)
    assert closed_form(layer.maps(), samples, config).heads == ((0, 3), (1, 4), (2, 5))


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 7), seed=st.integers(0, 50))
def test_clusters_merge_by_mean_correlation(count: int, seed: int) -> None:
    """Against the definition: logits written out, every pair of clusters compared afresh before every merge."""
    sample = make_layer(seed=seed, sharpness=1.0, dtype=torch.float64).sample(0, length=16)
    centred = []
    for row, position in enumerate(sample.rows.tolist()):
        logits = sample.query[row] @ sample.key[: position + 1].T
        centred.append(logits - logits.mean(-1, keepdim=True))
    similarity = torch.corrcoef(torch.cat(centred, -1))
    clusters = [[head] for head in range(8)]
    while len(clusters) > count:
        pairs = [(a, b) for i, a in enumerate(clusters) for b in clusters[:i]]
        first, second = max(pairs, key=lambda pair: float(similarity[pair[0]][:, pair[1]].mean()))
        clusters = [c for c in clusters if c not in (first, second)] + [first + second]
    assert head_groups([sample], count) == tuple(sorted(tuple(sorted(cluster)) for cluster in clusters))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_nnls_meets_the_optimality_conditions(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    design = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    gram, moment = design.T @ design, torch.randn(size, generator=generator, dtype=torch.float64)
    x = nnls(gram, moment)
    gradient = gram @ x - moment
    assert (x >= 0).all()
    assert (gradient > -1e-9).all()
    assert (gradient[x > 0].abs() < 1e-9).all()


def test_nnls_drops_what_pulls_the_wrong_way() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    assert nnls(gram, torch.tensor([3.0, 3.0], dtype=torch.float64)).tolist() == pytest.approx([1, 1])
    assert nnls(gram, torch.tensor([4.0, -1.0], dtype=torch.float64)).tolist() == pytest.approx([2, 0])
    assert nnls(gram, torch.tensor([-1.0, -1.0], dtype=torch.float64)).tolist() == [0, 0]


@pytest.mark.parametrize("dim", [1, 8, 9])
def test_too_narrow_an_index_head_is_refused(dim: int) -> None:
    with pytest.raises(UserError, match=f"index_head_dim {dim} is too narrow.*at least 10"):
        closed_form(LAYER.maps(), CALIBRATION, IndexerConfig(TOPK, 8, dim))


def test_no_calibration_is_refused() -> None:
    with pytest.raises(UserError, match="at least two tokens"):
        closed_form(LAYER.maps(), [], IndexerConfig(TOPK, 8, 24))


def test_values_that_are_not_finite_are_refused() -> None:
    broken = replace(CALIBRATION[0], hidden=CALIBRATION[0].hidden.clone())
    broken.hidden[5, 7] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        closed_form(LAYER.maps(), [CALIBRATION[1], broken], IndexerConfig(TOPK, 8, 24))


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3, 0.05], ids=str)
def test_tokens_with_next_to_no_hidden_state_change_little(size: float) -> None:
    """One in ten of them: what the LayerNorm divides others by, and so the scale of rotary and latent channels, stays."""
    config, maps = IndexerConfig(TOPK, 8, 24), replace(LAYER.maps(), latent_eps=1e-6)
    faint = [replace(sample, hidden=sample.hidden.clone()) for sample in CALIBRATION]
    for sample in faint:
        sample.hidden[5::10] *= size
    found, usual = (closed_form(maps, samples, config).weights for samples in (faint, CALIBRATION))
    close(found.k_norm_weight, usual.k_norm_weight, of_max=0.02)
    assert indexer_recall(found, config) > indexer_recall(usual, config) - 0.01


def test_hidden_states_that_are_all_zero_are_refused() -> None:
    nothing = [replace(sample, hidden=torch.zeros_like(sample.hidden)) for sample in CALIBRATION]
    with pytest.raises(UserError, match="zero on all calibration sequences"):
        closed_form(LAYER.maps(), nothing, IndexerConfig(TOPK, 8, 24))


def test_mass_that_no_head_explains_is_refused() -> None:
    """Attention to the keys the logits like least: every head would need a negative weight."""
    samples = []
    for sample in CALIBRATION:
        disliked = (-4 * sample.query @ sample.key.T).mean(1)
        future = torch.arange(len(sample.key)) > sample.rows[:, None]
        samples.append(replace(sample, mass=disliked.masked_fill(future, -torch.inf).softmax(-1)))
    with pytest.raises(UserError, match="no index head that follows"):
        closed_form(LAYER.maps(), samples, IndexerConfig(TOPK, 1, 24))
