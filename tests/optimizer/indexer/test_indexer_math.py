"""The indexer's maths against transformers' own module, its symmetries, and what recall counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_layer import make_layer
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer import indexer_math
from mla2dsa.optimizer.indexer.indexer_math import (
    captured_mass,
    index_scores,
    mean_recall,
    oracle_scores,
    random_indexer,
    recall,
    select,
    window_scores,
)

LAYER = make_layer()
EXACT_LAYER = make_layer(dtype=torch.float64)
CONFIG = IndexerConfig(index_topk=16, index_n_heads=4, index_head_dim=24)


def weights_for(config: IndexerConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> IndexerWeights:
    """Random weights of ordinary size, k_norm included, so that no term of the formula is trivial."""
    generator = torch.Generator().manual_seed(seed)
    shapes = IndexerWeights.shapes(config, LAYER.latent.shape[1], LAYER.q_a.shape[0])
    return IndexerWeights.from_tensors({n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()})


def transformers_indexer(config: IndexerConfig, rope_dim: int, topk: int) -> torch.nn.Module:
    sizes = {
        "hidden_size": LAYER.latent.shape[1],
        "q_lora_rank": LAYER.q_a.shape[0],
        "qk_rope_head_dim": rope_dim,
        "index_n_heads": config.index_n_heads,
        "index_head_dim": config.index_head_dim,
        "index_topk": topk,
        "num_hidden_layers": 1,
    }
    if config.rope_interleave:
        from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaConfig, GlmMoeDsaIndexer

        glm: torch.nn.Module = GlmMoeDsaIndexer(GlmMoeDsaConfig(**sizes), 0)
        return glm
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Config, DeepseekV32Indexer

    deepseek: torch.nn.Module = DeepseekV32Indexer(DeepseekV32Config(**sizes), 0)
    return deepseek


@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (4, 24), (8, 64)], ids=lambda v: str(v))
@pytest.mark.parametrize("interleave", [False, True], ids=["deepseek_v32", "glm_moe_dsa"])
def test_matches_the_indexer_of_transformers(heads: int, dim: int, interleave: bool) -> None:
    config = IndexerConfig(16, heads, dim, rope_interleave=interleave)
    sample = LAYER.sample(1, rows=torch.arange(96))
    weights = weights_for(config)
    module = transformers_indexer(config, 2 * sample.cos.shape[1], topk=96)
    module.load_state_dict(weights.tensors(), strict=True)
    tables = tuple(torch.cat((table, table), -1)[None] for table in (sample.cos, sample.sin))
    causal = torch.ones(1, 96, 96, dtype=torch.bool).tril()
    order = module(sample.hidden[None], sample.q_resid[None], tables, causal, None)[0].long()
    scores = index_scores(weights, config, sample)
    rounding = 1e-6 * float(scores[scores.isfinite()].abs().max())
    # Both rank all 96 keys (ReLU makes some exact ties): our scores read in its order must descend as in ours.
    ours = scores.sort(-1, descending=True).values
    torch.testing.assert_close(scores.gather(-1, order), ours, rtol=0, atol=2 * rounding)


def test_scores_are_the_sum_over_heads_written_out() -> None:
    config = IndexerConfig(4, 2, 12)
    sample, weights = EXACT_LAYER.sample(2, length=12), weights_for(config, torch.float64)
    scores = index_scores(weights, config, sample)
    half = sample.cos.shape[1]

    def rotated(vector: Tensor, position: int) -> Tensor:
        cos, sin = sample.cos[position], sample.sin[position]
        a, b = vector[:half], vector[half : 2 * half]
        return torch.cat((a * cos - b * sin, a * sin + b * cos, vector[2 * half :]))

    def key(position: int) -> Tensor:
        k = weights.wk @ sample.hidden[position]
        k = (k - k.mean()) / (k.var(correction=0) + 1e-6).sqrt() * weights.k_norm_weight + weights.k_norm_bias
        return rotated(k, position)

    for row, position in enumerate(sample.rows.tolist()):
        queries = (weights.wq_b @ sample.q_resid[position]).view(2, 12)
        head_weights = weights.weights_proj @ sample.hidden[position]
        for other in range(12):
            dots = torch.stack([rotated(query, position) @ key(other) for query in queries])
            expected = head_weights @ torch.relu(dots) * 2**-0.5 * 12**-0.5 if other <= position else -torch.inf
            assert scores[row, other] == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


def test_interleaved_is_half_split_with_permuted_rotary_rows() -> None:
    sample, weights = LAYER.sample(3), weights_for(CONFIG)
    order = torch.arange(24)
    order[:8] = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    permuted = replace(
        weights,
        wq_b=weights.wq_b.view(4, 24, -1)[:, order].flatten(0, 1),
        wk=weights.wk[order],
        k_norm_weight=weights.k_norm_weight[order],
        k_norm_bias=weights.k_norm_bias[order],
    )
    expected = index_scores(weights, CONFIG, sample)
    got = index_scores(permuted, replace(CONFIG, rope_interleave=True), sample)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)  # the same sums, in another order


def test_nope_layer_has_no_rotation() -> None:
    layer = make_layer(rope_dim=0)
    sample, weights = layer.sample(4), weights_for(CONFIG)
    shifted = replace(sample, hidden=sample.hidden.roll(1, 0), q_resid=sample.q_resid.roll(1, 0), rows=sample.rows[1:])
    there = index_scores(weights, CONFIG, replace(sample, rows=sample.rows[1:] - 1))[:, :-1]
    here = index_scores(weights, CONFIG, shifted)[:, 1:]
    torch.testing.assert_close(here, there)  # content decides, position only through the causal mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_follows_the_hidden_states(dtype: torch.dtype) -> None:
    sample = make_layer(dtype=dtype).sample(5)
    assert index_scores(weights_for(CONFIG, torch.bfloat16), CONFIG, sample).dtype == dtype


def test_row_blocks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, weights = EXACT_LAYER.sample(6), weights_for(CONFIG, torch.float64)
    whole = index_scores(weights, CONFIG, sample)
    monkeypatch.setattr(indexer_math, "BLOCK_ELEMENTS", 7 * 4 * 96 + 1)
    assert len(list(indexer_math.row_blocks(sample.rows, 4 * 96))) == 6
    with torch.no_grad():
        torch.testing.assert_close(index_scores(weights, CONFIG, sample), whole)


def test_gradients_are_those_of_finite_differences() -> None:
    config = IndexerConfig(4, 2, 6)
    layer = make_layer(hidden=10, q_lora=6, kv_lora=4, rope_dim=4, dtype=torch.float64)
    sample = layer.sample(7, length=6)
    shapes = IndexerWeights.shapes(config, 10, 6)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes.values()]

    def seen(*tensors: Tensor) -> Tensor:
        weights = IndexerWeights.from_tensors(dict(zip(shapes, tensors, strict=True)))
        return index_scores(weights, config, sample).masked_fill(torch.arange(6) > sample.rows[:, None], 0.0)

    assert torch.autograd.gradcheck(seen, leaves)


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_scores_are_positively_homogeneous_in_weights_proj(factor: float, seed: int) -> None:
    sample, weights = EXACT_LAYER.sample(8), weights_for(CONFIG, torch.float64, seed)
    scaled = replace(weights, weights_proj=factor * weights.weights_proj)
    expected = factor * index_scores(weights, CONFIG, sample)
    torch.testing.assert_close(index_scores(scaled, CONFIG, sample), expected)


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(0.1, 1e4), seed=st.integers(0, 1000))
def test_layernorm_forgets_the_scale_of_wk(factor: float, seed: int) -> None:
    sample, weights = EXACT_LAYER.sample(9), weights_for(CONFIG, torch.float64, seed)
    scaled = replace(weights, wk=factor * weights.wk)  # deviations of about 8: epsilon is nothing even at 0.1
    expected = index_scores(weights, CONFIG, sample)
    torch.testing.assert_close(index_scores(scaled, CONFIG, sample), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 1000))
def test_index_heads_may_be_permuted(order: list[int], seed: int) -> None:
    sample, weights = EXACT_LAYER.sample(10), weights_for(CONFIG, torch.float64, seed)
    moved = replace(
        weights,
        wq_b=weights.wq_b.view(4, 24, -1)[order].flatten(0, 1),
        weights_proj=weights.weights_proj[order],
    )
    expected = index_scores(weights, CONFIG, sample)
    torch.testing.assert_close(index_scores(moved, CONFIG, sample), expected)


def test_layer_formula_of_the_maps_gives_the_logits_of_query_and_key() -> None:
    layer = EXACT_LAYER
    maps, sample = layer.maps(), layer.sample(11)
    half = sample.cos.shape[1]
    c = maps.latent_gain * (sample.hidden @ maps.latent.T)
    c /= (sample.hidden @ maps.latent.T).square().mean(-1, keepdim=True).sqrt()
    rotate = torch.complex(sample.cos, sample.sin)
    k = sample.hidden @ maps.k_rope.T
    k = torch.complex(k[:, :half], k[:, half:]) * rotate
    dense = layer.logits(sample.hidden, sample.q_resid, sample.cos, sample.sin)
    for head in range(8):
        u = sample.q_resid[sample.rows]
        q = u @ maps.q_rope[head].T
        q = torch.complex(q[:, :half], q[:, half:]) * rotate[sample.rows]
        formula = maps.scale * (u @ maps.q_absorbed[head].T @ c.T + (q.conj() @ k.T).real)
        torch.testing.assert_close(maps.scale * sample.query[:, head] @ sample.key.T, formula)
        past = torch.arange(96) <= sample.rows[:, None]
        torch.testing.assert_close(dense[head, sample.rows][past], formula[past])


def test_window_keeps_sinks_and_the_most_recent() -> None:
    sample = LAYER.sample(12)
    picked = select(window_scores(sample), 10)
    for row, keys in zip(sample.rows.tolist(), picked.tolist(), strict=True):
        assert set(keys) == {0, 1, 2, 3} | set(range(row - 5, row + 1))


def test_select_gives_equal_scores_to_the_lowest_position() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.0, 2.0, 0.0, -torch.inf], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert select(scores, 4).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    level = torch.zeros(3, 5000)  # long enough for a sort that is not stable to show it
    level[:, 4000] = 1.0
    assert select(level, 300).tolist() == [[4000, *range(299)]] * 3


def test_recall_is_the_mass_on_the_selected_keys() -> None:
    mass = torch.tensor([[1.0, 0, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]])
    scores = torch.tensor([[1.0, -torch.inf, -torch.inf, -torch.inf], [3, 2, 1, -torch.inf], [1, 4, 3, 2]])
    rows = torch.tensor([0, 2, 3])
    torch.testing.assert_close(captured_mass(scores, mass, 2, rows), torch.tensor([0.5, 0.5]))
    assert recall(scores, mass, 2, rows) == pytest.approx(0.5)
    assert recall(scores, mass, 3, rows) == pytest.approx(0.9)  # only the last row has more than 3 keys


def test_recall_refuses_rows_that_all_keep_everything() -> None:
    sample = LAYER.sample(13)
    with pytest.raises(UserError, match="index_topk 96 has no query row"):
        recall(sample.mass, sample.mass, 96, sample.rows)
    with pytest.raises(UserError, match="longer calibration sequences"):
        mean_recall(oracle_scores, [], 8)


def test_mean_recall_pools_rows_of_all_samples() -> None:
    short, long = LAYER.sample(14, rows=torch.tensor([20])), LAYER.sample(15, rows=torch.tensor([30, 60, 90]))
    pooled = mean_recall(oracle_scores, [short, long], 16)
    each = [recall(s.mass, s.mass, 16, s.rows) for s in (short, long)]
    assert pooled == pytest.approx((each[0] + 3 * each[1]) / 4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), topk=st.integers(1, 20))
def test_nothing_beats_the_oracle(seed: int, topk: int) -> None:
    sample = LAYER.sample(16)
    oracle = mean_recall(oracle_scores, [sample], topk)
    with torch.no_grad():
        indexer = mean_recall(lambda s: index_scores(weights_for(CONFIG, seed=seed), CONFIG, s), [sample], topk)
    assert 0 <= indexer <= oracle + 1e-6
    assert mean_recall(window_scores, [sample], topk) <= oracle + 1e-6
    assert oracle <= 1 + 1e-6


def test_random_indexer_is_seeded_and_standard() -> None:
    config = IndexerConfig(64, 16, 128)
    first, again, other = (random_indexer(config, 256, 96, seed) for seed in (3, 3, 4))
    expected = IndexerWeights.shapes(config, 256, 96)
    assert {name: tuple(t.shape) for name, t in first.tensors().items()} == expected
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    assert not torch.equal(first.wk, other.wk)
    for projection in (first.wq_b, first.wk, first.weights_proj):
        assert projection.std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first.k_norm_weight, torch.ones(128))
    assert torch.equal(first.k_norm_bias, torch.zeros(128))
