"""What the ops promise for any input: hypothesis draws the shapes, the ranges and scores that tie."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mla2dsa.kernels import cpu, reference

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 24)
few = st.integers(1, 4)
budgets = st.sampled_from([0, 64])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
PROFILE = settings(max_examples=60, deadline=None)


class Draw:
    """Small tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def ints(self, *shape: int, low: int = -2, high: int = 2) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def ranges(self, batch: int, queries: int, slots: int) -> tuple[Tensor, Tensor]:
        begin = self.ints(batch, queries, low=-2, high=slots + 1)
        return begin, begin + self.ints(batch, queries, low=-2, high=slots + 4)


def slots_in_range(begin: Tensor, end: Tensor, slots: int) -> Tensor:
    return (end.clamp(0, slots) - begin.clamp(0, slots)).clamp(min=0)


@PROFILE
@given(seeds, few, sizes, sizes, few, st.integers(1, 30), dtypes, budgets)
def test_indexer_selects_the_best_of_the_range(
    seed: int, batch: int, queries: int, slots: int, heads: int, topk: int, dtype: torch.dtype, budget: int
) -> None:
    draw = Draw(seed)
    q, k = draw.ints(batch, queries, heads, 3).to(dtype), draw.ints(batch, slots, 3).to(dtype)
    weights, (begin, end) = draw.ints(batch, queries, heads).to(dtype), draw.ranges(batch, queries, slots)
    got = cpu.lightning_indexer(q, k, weights, begin, end, topk, budget_mb=budget)
    assert torch.equal(got, reference.lightning_indexer(q, k, weights, begin, end, topk))

    used = got >= 0
    counts = slots_in_range(begin, end, slots).clamp(max=topk)
    assert torch.equal(used.sum(-1), counts)  # exactly min(topk, keys in range)
    assert torch.equal(used, torch.arange(got.shape[-1]) < counts.unsqueeze(-1))  # slots first, then -1
    assert bool((got.diff(dim=-1) > 0)[used[..., 1:]].all())  # ascending, hence distinct
    assert bool(((got >= begin.unsqueeze(-1)) & (got < end.unsqueeze(-1)))[used].all())

    scores = (weights.double().unsqueeze(-1) * (q.double() @ k.double().mT.unsqueeze(1)).relu()).sum(2)
    taken = torch.zeros(batch, queries, slots + 1, dtype=torch.bool).scatter_(
        2, got.masked_fill(~used, slots).long(), True
    )
    taken = taken[..., :slots]
    left = ~taken & reference.in_range(begin, end, slots)
    worst_taken = scores.masked_fill(~taken, torch.inf).amin(-1)
    best_left = scores.masked_fill(~left, -torch.inf).amax(-1)
    assert bool((best_left <= worst_taken).all())
    # of the keys that tie with the worst one taken, those taken come first
    tied = scores == worst_taken.unsqueeze(-1)
    slot = torch.arange(slots)
    last_taken = slot.where(tied & taken, -1).amax(-1)
    first_left = slot.where(tied & left, slots).amin(-1)
    assert bool((last_taken < first_left).all())


@PROFILE
@given(seeds, few, sizes, sizes, few, st.integers(0, 12), budgets)
def test_sparse_is_softmax_over_the_valid_slots(
    seed: int, batch: int, queries: int, slots: int, heads: int, selected: int, budget: int
) -> None:
    draw = Draw(seed)
    q, kv = draw.normal(batch, queries, heads, 6), draw.normal(batch, slots, 6)
    indices = draw.ints(batch, queries, selected, low=-3, high=slots + 2).to(torch.int32)
    got = cpu.sparse_mla(q, kv, indices, 0.7, 4, budget_mb=budget)
    torch.testing.assert_close(got, reference.sparse_mla(q, kv, indices, 0.7, 4), rtol=1e-12, atol=1e-12)

    shuffled = indices[..., torch.randperm(selected, generator=draw.generator)]
    torch.testing.assert_close(cpu.sparse_mla(q, kv, shuffled, 0.7, 4), got, rtol=1e-12, atol=1e-12)
    ones = torch.cat((torch.ones_like(kv[..., :4]), kv[..., 4:]), -1)  # values of 1: the output is the softmax's sum
    sums = cpu.sparse_mla(q, ones, indices, 0.7, 4)
    valid = ((indices >= 0) & (indices < slots)).any(-1)[:, :, None, None].double().expand_as(sums)
    torch.testing.assert_close(sums, valid)


@PROFILE
@given(seeds, few, sizes, sizes, few, dtypes, budgets)
def test_mass_is_a_distribution_over_the_range(
    seed: int, batch: int, queries: int, slots: int, heads: int, dtype: torch.dtype, budget: int
) -> None:
    draw = Draw(seed)
    q, kv = draw.normal(batch, queries, heads, 6).to(dtype), draw.normal(batch, slots, 6).to(dtype)
    begin, end = draw.ranges(batch, queries, slots)
    got = cpu.attention_mass(q, kv, begin, end, 0.7, budget_mb=budget)
    torch.testing.assert_close(got, reference.attention_mass(q, kv, begin, end, 0.7))
    assert bool((got >= 0).all())
    assert bool((got[~reference.in_range(begin, end, slots)] == 0).all())
    torch.testing.assert_close(got.sum(-1), (slots_in_range(begin, end, slots) > 0).to(got.dtype))


@PROFILE
@given(seeds, sizes, sizes, few, st.integers(1, 8))
def test_scaling_the_weights_by_a_power_of_two_keeps_the_selection(
    seed: int, queries: int, slots: int, heads: int, topk: int
) -> None:
    draw = Draw(seed)
    q, k, weights = draw.normal(1, queries, heads, 4), draw.normal(1, slots, 4), draw.normal(1, queries, heads)
    begin, end = draw.ranges(1, queries, slots)
    want = cpu.lightning_indexer(q, k, weights, begin, end, topk)
    assert torch.equal(cpu.lightning_indexer(q, k, weights / 64, begin, end, topk), want)
    assert torch.equal(cpu.lightning_indexer(q * 8, k, weights, begin, end, topk), want)


@PROFILE
@given(seeds, sizes, sizes, few, st.integers(1, 8), dtypes, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_no_input_makes_an_index_leave_the_range(
    seed: int, queries: int, slots: int, heads: int, topk: int, dtype: torch.dtype, poison: float
) -> None:
    draw = Draw(seed)
    q, k, weights = draw.normal(1, queries, heads, 4), draw.normal(1, slots, 4), draw.normal(1, queries, heads)
    for tensor in (q, k, weights):
        tensor[draw.ints(*tensor.shape, low=0, high=9) == 0] = poison
    begin, end = draw.ranges(1, queries, slots)
    for impl in (cpu, reference):
        got = impl.lightning_indexer(q.to(dtype), k.to(dtype), weights.float(), begin, end, topk)
        used = got >= 0
        assert torch.equal(used.sum(-1), slots_in_range(begin, end, slots).clamp(max=topk))
        assert bool(((got >= begin.unsqueeze(-1)) & (got < end.unsqueeze(-1)))[used].all())
        assert bool((got[~used] == -1).all())
