"""Generate text from anything that takes tokens and keeps its own caches: prefill in chunks, then token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError, short
from ..files.sizes import PREFILL_CHUNK

# A session does not know how it came to its size.
_LARGER = " (a checkpoint's cache holds its context; an exported folder's comes from export --max-seq, an engine's from build --max)"


class Session(Protocol):
    """One batch of sequences with their caches. `capacity`: tokens a cache holds; `batch`: rows of the caches. One that is given more or
    fewer than PREFILL_CHUNK tokens of a prompt at once says so as `chunk`."""

    capacity: int
    batch: int

    def step(self, ids: Tensor, positions: Tensor, slots: Tensor, key_begin: Tensor, last: Tensor) -> Tensor:
        """Feed ids, positions, slots [B, T] int64, key_begin and last [B]; logits [B, vocab] float32 at index `last`."""
        ...


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most likely token (ties: the lowest id); top_k keeps so many (0: all), top_p of these the
    smallest set of that mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature {self.temperature}, expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}, expected more than 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k}, expected 0 (all tokens) or more")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed {short(self.seed)}, expected a number of 64 bits")

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def pick(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """[B] token ids from logits [B, vocab] float32."""
        if self.temperature == 0:
            return logits.argmax(-1)
        below = (logits - logits.amax(-1, keepdim=True)).double()  # no temperature makes the best of them infinite
        scores, order = torch.sort((below / self.temperature).float(), dim=-1, descending=True, stable=True)
        if self.top_k:
            scores[:, self.top_k :] = -math.inf
        ranked = scores.softmax(-1)
        left_out = ranked.cumsum(-1) - ranked >= self.top_p
        left_out[:, 0] = False  # a float32 may take top_p for zero
        ranked = ranked.masked_fill(left_out, 0.0)
        choice = torch.multinomial(ranked, 1, generator=generator)
        return order.gather(-1, choice)[:, 0]


@dataclass(frozen=True)
class Step:
    """The next id of every sequence (None once it has ended), and the logits [B, vocab] float32 that it was picked from."""

    picked: list[int | None]
    logits: Tensor


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """The ids of `steps`."""
    return (step.picked for step in steps(session, prompts, max_new_tokens, sampling, stop))


def steps(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int] = (),
) -> Iterator[Step]:
    """Yield, token by token, what comes next in every sequence. A session may be used again once this is over or given up.

    Prompts may differ in length: short rows are padded on the right by repeating their last token in its own slot, which
    writes the same values again. Raises UserError when a prompt is empty or it and the new tokens exceed the cache.
    """
    longest = max(len(prompt) for prompt in prompts)
    _check(session, prompts, longest, max_new_tokens)
    generator = sampling.generator()
    logits = prefill(session, prompts, longest)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    begin, last = torch.zeros(len(prompts), dtype=torch.int64), torch.zeros(len(prompts), dtype=torch.int64)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for count in range(max_new_tokens):
        picked = sampling.pick(logits, generator)
        ended |= torch.isin(picked, torch.tensor(list(stop), dtype=torch.int64)) if stop else False
        yield Step([None if done else int(token) for token, done in zip(picked, ended.tolist(), strict=True)], logits)
        if bool(ended.all()) or count == max_new_tokens - 1:
            return
        at = (lengths + count)[:, None]
        logits = session.step(picked[:, None], at, at, begin, last)


class Walk:
    """One sequence that is led: `logits` [vocab] float32 say what may come next, and whoever reads them decides."""

    def __init__(self, session: Session, prompt: Sequence[int], most: int) -> None:
        """most: tokens that may be fed, and one more that is only looked at. Raises UserError where they do not fit."""
        _check(session, [prompt], len(prompt), most)
        self._session, self._at = session, torch.tensor([[len(prompt)]])
        self.logits = prefill(session, [prompt], len(prompt))[0]

    def feed(self, token: int) -> None:
        zero = torch.zeros(1, dtype=torch.int64)
        self.logits = self._session.step(torch.tensor([[token]]), self._at, self._at, zero, zero)[0]
        self._at = self._at + 1


def _check(session: Session, prompts: Sequence[Sequence[int]], longest: int, max_new_tokens: int) -> None:
    if not all(len(prompt) for prompt in prompts):
        raise UserError("the prompt is empty: give at least one token")
    if len(prompts) != session.batch:
        raise UserError(f"{len(prompts)} prompts, expected {session.batch} (the batch of this session)")
    if longest > session.capacity:
        raise UserError(f"the prompt has {longest} tokens, the cache holds {session.capacity}; shorten it{_LARGER}")
    if longest + max_new_tokens - 1 > session.capacity:
        raise UserError(
            f"{longest} prompt tokens and {max_new_tokens} new ones exceed the cache of {session.capacity}; "
            f"ask for fewer with --max-new-tokens{_LARGER}"
        )


def chunk_of(session: Session) -> int:
    """Tokens of a prompt that it is given at once."""
    return int(getattr(session, "chunk", PREFILL_CHUNK))


def prefill(session: Session, prompts: Sequence[Sequence[int]], longest: int) -> Tensor:
    """[B, vocab] float32 logits after each prompt's last token; one chunk at a time, so memory does not grow with the prompt."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    positions = torch.minimum(torch.arange(longest)[None], lengths[:, None] - 1)
    ids = torch.tensor([[prompt[int(p)] for p in row] for prompt, row in zip(prompts, positions, strict=True)])
    begin = torch.zeros(len(prompts), dtype=torch.int64)
    result: Any = None
    step = chunk_of(session)
    for start in range(0, longest, step):
        part = slice(start, min(start + step, longest))
        # A row that ended in an earlier chunk repeats its last token; its logits are those of the chunk it ended in.
        last = (lengths - 1 - start).clamp(0, part.stop - start - 1)
        logits = session.step(ids[:, part], positions[:, part], positions[:, part], begin, last)
        result = logits if result is None else torch.where((lengths > start)[:, None], logits, result)
    return result  # type: ignore[no-any-return]
