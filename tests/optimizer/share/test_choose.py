"""Which layers share: sets by the mass that layers lose, as many layers as the measured loss allows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla2dsa.optimizer.share.choose import choose, passes, sets_of

# own, then by the selection of one, two, three layers before
MASSES = [(0.9,), (0.9, 0.5), (0.9, 0.89, 0.6), (0.9, 0.7, 0.85, 0.6), (0.9, 0.9, 0.4, 0.88), (0.9, 0.6, 0.2, 0.1)]

masses = st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=12).map(
    lambda rows: [tuple(row[: number + 1]) for number, row in enumerate(rows)]
)


def test_sets_grow_with_what_is_lost() -> None:
    """3 lost 0.05 with 1's, and after 2 and 3 share with it, 4 is too far from it with 0.02: a larger set, not one with 4 added."""
    assert sets_of(MASSES) == [(4,), (2, 4), (2, 3, 4), (1, 2, 3, 5)]


@given(masses)
def test_every_set_can_be_run(found: list[tuple[float, ...]]) -> None:
    """The first layer never shares, and no layer with one more than three before it."""
    for one in sets_of(found):
        assert one
        assert one == tuple(sorted(set(one)))
        assert 0 not in one
        assert max(one) < len(found)
        full = [layer for layer in range(len(found)) if layer not in one]
        assert all(layer - max(f for f in full if f < layer) <= 3 for layer in one)


@given(masses, st.floats(0, 2))
def test_as_many_as_the_loss_allows(found: list[tuple[float, ...]], allowed: float) -> None:
    asked = list[tuple[int, ...]]()

    def loss(shared: tuple[int, ...]) -> float:
        asked.append(shared)
        return 3.0 + 0.1 * len(shared) ** 2

    chosen, sets = choose(found, loss, allowed), sets_of(found)
    fitting = [one for one in sets if loss(one) - 3.0 <= allowed]
    assert chosen.shared == (fitting[-1] if fitting else ())
    assert asked[0] == ()
    assert len(asked) - len(sets) <= passes(len(found))
    assert chosen.loss == pytest.approx(0.1 * len(chosen.shared) ** 2)
    assert chosen.loss <= allowed


def test_a_loss_that_falls_is_taken_as_it_is() -> None:
    chosen = choose(MASSES, lambda shared: 1.0 - 0.01 * len(shared), 0.005)
    assert chosen.shared == sets_of(MASSES)[-1]
    assert chosen.loss < 0


@pytest.mark.parametrize("found", [[], [(0.5,)], [(0.5,), (0.4, float("nan"))]], ids=["no layer", "one", "no number"])
def test_nothing_to_choose(found: Any) -> None:
    assert choose(found, lambda shared: 1.0, 0.1).shared == ()
