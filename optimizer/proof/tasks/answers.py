"""Ask a session: one prefill a prompt, then the greedy answer, and the log-probability of the right one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....runtime.generation import Session, prefill
from .examples import EXTRA, Example


@dataclass(frozen=True)
class Answer:
    """found: share of what was wanted that the greedy answer names. logprob: of the right answer, nats, all its tokens together;
    exact: whether every one of them is the most likely."""

    text: str
    found: float
    logprob: float
    exact: bool


@torch.no_grad()
def ask(
    session: Session, batch: Sequence[Example], decode: Callable[[Sequence[int]], str], stop: Sequence[int] = ()
) -> list[Answer]:
    """Answers to as many examples as the session has rows. A greedy answer ends at `stop`, or EXTRA tokens after the longest."""
    asked = _Asked(session, batch)
    return [
        Answer(text, share_found(text, example.wanted), logprob, exact)
        for example, text, (logprob, exact) in zip(
            batch, map(decode, asked.greedy(stop)), asked.right_answers(), strict=True
        )
    ]


class _Asked:
    """Prompts in the caches of a session; what comes after them is written there anew by each method."""

    def __init__(self, session: Session, batch: Sequence[Example]) -> None:
        prompts = [example.prompt for example in batch]
        self.session, self.answers = session, [example.answer for example in batch]
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.first = prefill(session, prompts, max(map(len, prompts)))
        self.steps = max(map(len, self.answers))
        # While a greedy answer is the right one, its logits are the right one's, too.
        self.shared: list[Tensor] = []

    def _step(self, tokens: Tensor, count: int) -> Tensor:
        """Logits after the token number `count` of every answer."""
        at = (self.lengths + count).clamp(max=self.session.capacity - 1)[
            :, None
        ]  # rows that are done may be at the end
        zero = torch.zeros(len(self.lengths), dtype=torch.int64)
        return self.session.step(tokens[:, None], at, at, zero, zero)

    def greedy(self, stop: Sequence[int]) -> list[list[int]]:
        """Tokens of every row, up to a stop token."""
        room = self.session.capacity - int(self.lengths.max()) + 1
        ended, ids = torch.zeros(len(self.lengths), dtype=torch.bool), list[Tensor]()
        logits, together = self.first, True
        for count in range(min(self.steps + EXTRA, room)):
            picked = logits.argmax(-1)
            if together:
                self.shared.append(logits)
                together = count < self.steps and bool((picked == self._right(count)).all())
            ended |= torch.isin(picked, torch.tensor(list(stop), dtype=torch.int64))
            ids.append(picked.masked_fill(ended, -1))
            if bool(ended.all()):
                break
            logits = self._step(picked, count)
        rows = torch.stack(ids, 1).tolist()
        return [row[: row.index(-1)] if -1 in row else row for row in rows]

    def right_answers(self) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of every row; call it after `greedy`."""
        seen = self.shared[: self.steps]
        for count in range(len(seen), self.steps):
            seen.append(self._step(self._right(count - 1), count - 1))
        found = []
        for row, answer in enumerate(self.answers):
            scores = torch.stack([torch.log_softmax(logits[row], -1) for logits in seen[: len(answer)]])
            wanted = torch.tensor(answer)
            exact = bool((scores.argmax(-1) == wanted).all())
            found.append((float(scores.gather(-1, wanted[:, None]).double().sum()), exact))
        return found

    def _right(self, count: int) -> Tensor:
        """Token number `count` of every right answer; of one that is over, its last."""
        return torch.tensor([answer[min(count, len(answer) - 1)] for answer in self.answers])


def share_found(text: str, wanted: Sequence[str]) -> float:
    """Of `wanted`, each as a word of its own: 12 is not in 123."""
    named = [bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)) for word in wanted]
    return sum(named) / len(named)
