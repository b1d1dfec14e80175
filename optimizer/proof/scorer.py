"""Log-probabilities and continuations of token sequences by a session; what two sequences begin with is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...errors import UserError
from ...files.sizes import PREFILL_CHUNK
from ...runtime.generation import Sampling
from ...runtime.torch_session import EveryLogit


class Scorer:
    """One row of a session. Sequences that follow one another should begin alike: the caches still hold that part."""

    def __init__(self, session: EveryLogit) -> None:
        if session.batch != 1:
            raise UserError(f"a session of {session.batch} rows, expected one")
        self._session, self._held = session, list[int]()

    @property
    def most(self) -> int:
        """Tokens of a sequence."""
        return self._session.capacity

    @torch.no_grad()
    def score(self, ids: Sequence[int], first: int) -> tuple[float, bool]:
        """(nats of the tokens from number `first` >= 1 on, whether each of them is the most likely). At most `most` + 1 tokens."""
        total, greedy = 0.0, True
        for start, logits in self._fed(ids[:-1], first - 1):
            begin = max(start, first - 1)  # the logits after token number p are for number p + 1
            scores = torch.log_softmax(logits[begin - start :].float(), -1)
            wanted = torch.tensor(ids[begin + 1 : start + len(logits) + 1], device=scores.device)
            total += float(scores.gather(-1, wanted[:, None]).double().sum())
            greedy = greedy and bool((scores.argmax(-1) == wanted).all())
        return total, greedy

    def rolling(self, ids: Sequence[int], prefix: int) -> float:
        """Nats of all of `ids` after `prefix`. What is longer than the session holds is cut into windows; each token is judged once,
        in the last window after as much context as there is room for."""
        return sum(self.score(*window)[0] for window in windows(ids, prefix, self.most))

    @torch.no_grad()
    def continued(
        self, ids: Sequence[int], most: int, sampling: Sampling, done: Callable[[list[int]], bool]
    ) -> list[int]:
        """Up to `most` tokens, fewer when `done` says so of those there are or the session is full."""
        generator, new = sampling.generator(), list[int]()
        while len(new) < most and len(ids) + len(new) <= self.most:
            sequence = [*ids, *new]
            *_, (_, logits) = self._fed(sequence, len(sequence) - 1)
            new.append(int(sampling.pick(logits[-1:].float().cpu(), generator)[0]))
            if done(new):
                break
        return new

    def _fed(self, ids: Sequence[int], first: int) -> Iterator[tuple[int, Tensor]]:
        """(number of the first token, logits after it and the next ones [T, vocab]), up to the last token, `first` among them."""
        if not ids or len(ids) > self.most:
            raise UserError(f"{len(ids)} tokens, expected 1 to {self.most} (what the session holds)")
        start = min(_alike(self._held, ids), first)
        self._held = self._held[:start]
        for begin in range(start, len(ids), PREFILL_CHUNK):
            part = torch.tensor([list(ids[begin : begin + PREFILL_CHUNK])])
            at = torch.arange(begin, begin + part.shape[1])[None]
            logits = self._session.every(part, at, at, torch.zeros(1, dtype=torch.int64))[0]
            self._held += part[0].tolist()
            if begin + len(logits) > first:
                yield begin, logits


def windows(ids: Sequence[int], prefix: int, most: int) -> Iterator[tuple[list[int], int]]:
    """(tokens, number of the first that is judged): the first window begins with `prefix`, no input is longer than `most`."""
    for start in range(0, len(ids), most):
        end = min(start + most, len(ids))
        begin = end - most - 1
        window = [prefix, *ids[:end]] if begin < 0 else list(ids[begin:end])
        yield window, len(window) - (end - start)


def _alike(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        count += 1
    return count
