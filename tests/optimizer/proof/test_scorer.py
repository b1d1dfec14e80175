"""Windows of a text that is too long, and sequences that begin alike, on a session that counts what it is fed."""

import math

import pytest
import torch
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.optimizer.proof import scorer
from mla2dsa.optimizer.proof.scorer import Scorer, windows
from mla2dsa.runtime.generation import Sampling

VOCABULARY, MOST = 11, 8


class Counting:
    """A token's logits are decided by it and its place; what is in the caches has to be what came before."""

    batch, capacity = 1, MOST

    def __init__(self) -> None:
        self.fed = 0

    def every(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor) -> Tensor:
        assert int(slots.max()) < MOST
        self.fed += ids.shape[1]
        return torch.stack([self.logits(int(token), int(at)) for token, at in zip(ids[0], slots[0], strict=True)])[None]

    @staticmethod
    def logits(token: int, at: int) -> Tensor:
        return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(100 * at + token))


def nats(ids: list[int], first: int) -> tuple[float, bool]:
    scores = [torch.log_softmax(Counting.logits(token, at), -1) for at, token in enumerate(ids)]
    wanted = [(scores[number - 1], ids[number]) for number in range(first, len(ids))]
    return sum(float(s[token]) for s, token in wanted), all(int(s.argmax()) == token for s, token in wanted)


def greedy(ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(Counting.logits(ids[-1], len(ids) - 1).argmax())]
    return ids


@pytest.mark.parametrize("chunk", [3, 512])
def test_nats(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came before, and however much of it is in the caches."""
    monkeypatch.setattr(scorer, "PREFILL_CHUNK", chunk)
    of = Scorer(Counting())  # type: ignore[arg-type]
    cases = [
        ([1, 2, 3, 4, 5], 3),
        ([1, 2, 3, 4, 6], 4),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 1),
        ([1, 2], 1),
        (greedy([4], 5), 1),
    ]
    for ids, first in cases:
        found = of.score(ids, first)
        assert found == (pytest.approx(nats(ids, first)[0], abs=1e-5), nats(ids, first)[1])
    assert of.score(greedy([4], 5), 1)[1]


def test_what_two_begin_with_is_computed_once() -> None:
    session = Counting()
    of = Scorer(session)  # type: ignore[arg-type]
    of.score([1, 2, 3, 4, 5], 3)
    fed = session.fed
    of.score([1, 2, 3, 4, 6], 4)
    assert session.fed == fed + 1  # the logits after token number 3 alone are needed again


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 20])
def test_every_token_is_judged_once(length: int) -> None:
    ids = [10 + number for number in range(length)]
    found = list(windows(ids, 0, MOST))
    assert [token for window, first in found for token in window[first:]] == ids
    assert found[0][0][0] == 0
    assert all(len(window) <= MOST + 1 and first >= 1 for window, first in found)
    assert all(len(window) == MOST + 1 for window, _ in found[1:])


def test_a_long_text() -> None:
    of = Scorer(Counting())  # type: ignore[arg-type]
    ids = [number % VOCABULARY for number in range(20)]
    wanted = sum(nats(window, first)[0] for window, first in windows(ids, 3, MOST))
    assert of.rolling(ids, 3) == pytest.approx(wanted, abs=1e-4)
    assert of.rolling([], 3) == 0


def test_continued() -> None:
    of = Scorer(Counting())  # type: ignore[arg-type]
    right = greedy([4, 5], 9)[2:]
    assert of.continued([4, 5], 4, Sampling(), lambda new: False) == right[:4]
    assert of.continued([4, 5], 9, Sampling(), lambda new: False) == right[: MOST - 1]  # it is full then
    assert of.continued([4, 5], 9, Sampling(), lambda new: len(new) == 2) == right[:2]
    assert of.continued([4, 5], 3, Sampling(1.0, seed=5), lambda new: False) != right[:3]


@pytest.mark.parametrize("count", [0, MOST + 1])
def test_what_does_not_fit(count: int) -> None:
    with pytest.raises(UserError, match=f"{count} tokens, expected 1 to {MOST}"):
        Scorer(Counting()).score([1] * (count + 1), max(1, count))  # type: ignore[arg-type]


def test_stand_in_is_not_flat() -> None:
    assert not math.isclose(nats([1, 2], 1)[0], -math.log(VOCABULARY), rel_tol=1e-3)
