"""Ridge regression whose weights change a little at a time, held against the same solved from the beginning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mla2dsa.optimizer.indexer import ridge as module
from mla2dsa.optimizer.indexer.ridge import Ridge

RIDGE = 0.5


def directly(tokens: Tensor, weight: Tensor) -> Tensor:
    primal = tokens.T @ (weight[:, None] * tokens) + RIDGE * torch.eye(tokens.shape[1], dtype=torch.float64)
    return torch.linalg.solve(primal, tokens.T @ weight)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    channels=st.integers(1, 16),
    seed=st.integers(0, 1000),
    rows=st.sampled_from([1, 5, 1024]),
)
def test_it_follows_weights_and_tokens(sizes: list[int], channels: int, seed: int, rows: int) -> None:
    """The dual form and the primal one, and the way from one to the other."""
    generator = torch.Generator().manual_seed(seed)
    first, *more = [torch.randn(size, channels, generator=generator, dtype=torch.float64) for size in sizes]
    before, module._ROWS = module._ROWS, rows
    try:
        found, base, tokens = Ridge(first, RIDGE), torch.ones(len(first), dtype=torch.float64), first
        for added in [None, *more]:
            if added is not None:
                found.add(added)
                base = torch.cat((base[: len(first)], 2 * base[len(first) :], torch.ones(len(added))))
                tokens = torch.cat((tokens, added))
            assert torch.equal(found.base, base)
            assert found.added == len(tokens) - len(first)
            for _ in range(3):
                weight = base * torch.where(torch.rand(len(base), generator=generator) < 0.5, 1.0, 0.03)
                torch.testing.assert_close(found.solved(weight), directly(tokens, weight), atol=1e-9, rtol=1e-9)
    finally:
        module._ROWS = before


@pytest.mark.parametrize("changed", [0, 3], ids=["none", "three"])
def test_only_what_changed_is_multiplied(changed: int) -> None:
    tokens = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Ridge(tokens, RIDGE)
    found.solved(found.base)
    found.tokens = tokens.clone()
    found.tokens[changed:] = torch.nan  # what is not multiplied again
    found._follow(found.base.index_fill(0, torch.arange(changed), 0.1))
    assert found._parts is not None
    assert bool(found._parts[0].isfinite().all())
