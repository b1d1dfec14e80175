"""Run the long-context tasks: dense, DSA, mass oracle and window side by side, and limits on what DSA may lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from ....errors import UsageError
from ....files.model.stop_tokens import stop_tokens
from ....runtime.generation import Session
from ...model.text import load_tokenizer
from ..limits import CALIBRATE_BETTER, Check
from .answers import Answer, ask
from .examples import Example, examples
from .prompts import STYLES, TASKS
from .selections import VARIANTS
from .sessions import Variants
from .words import built_in, from_text

ALL = "long"  # the gate of all tasks
LONG = 4096  # tokens where none are said: the shortest that RULER has


@dataclass(frozen=True)
class Settings:
    """What is asked. lengths: in tokens, prompt and answer; depths: percent of the text before the needle; samples: prompts of each
    task, length and depth; text: what things are hidden in, None for built-in sentences; batch: prompts that a session answers at
    once. The same settings give the same prompts."""

    lengths: tuple[int, ...]
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    tasks: tuple[str, ...] = tuple(TASKS)
    samples: int = 5
    seed: int = 0
    style: str = "prose"
    text: str | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        for flag, given, known in (("--tasks", self.tasks, TASKS), ("--style", (self.style,), STYLES)):
            if unknown := [name for name in given if name not in known]:
                raise UsageError(f"{flag} {unknown[0]}: expected one of {', '.join(known)}")
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise UsageError(f"--lengths {self.lengths}: expected different numbers of tokens, as in 4k,8k")
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise UsageError(f"--depths {self.depths}: expected percentages, as in 0,50,100")
        for flag, number in (("--samples", self.samples), ("--batch", self.batch)):
            if number < 1:
                raise UsageError(f"{flag} {number}, expected at least 1")


@dataclass(frozen=True)
class Score:
    """One variant on the prompts of one task, length and depth.

    accuracy: percent of what was wanted that greedy answers name, standard_error over prompts; logprob: of the right answer, nats a
    token; exact: percent of prompts whose greedy answer is the right one token by token.
    """

    variant: str
    task: str
    length: int
    depth: int | None
    samples: int
    accuracy: float
    standard_error: float
    logprob: float
    exact: float


@dataclass(frozen=True)
class LongResult:
    """All scores, with what they were made of. haystack: the text, or that it was built in."""

    scores: tuple[Score, ...]
    index_topk: int
    haystack: str
    settings: Settings

    def of(self, task: str, length: int, variant: str) -> list[Score]:
        """At every depth. task: a task's name, that of its group, or ALL."""
        return [
            score
            for score in self.scores
            if score.length == length
            and score.variant == variant
            and task in (score.task, TASKS[score.task].group, ALL)
        ]

    def accuracy(self, task: str, length: int, variant: str) -> float:
        """Percent, the mean over depths; NaN where it was not run."""
        return _mean([score.accuracy for score in self.of(task, length, variant)])

    def logprob(self, task: str, length: int, variant: str) -> float:
        """Nats a token, the mean over depths."""
        return _mean([score.logprob for score in self.of(task, length, variant)])


class Open(Protocol):
    """Gives a session of a variant with this many rows and slots."""

    def __call__(self, variant: str, batch: int, capacity: int) -> Session: ...


def run_long(
    folder: Path, settings: Settings, *, dtype: torch.dtype = torch.float32, device: str = "cpu", trust_remote_code: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> LongResult:  # fmt: skip
    """The tasks on the DSA checkpoint in `folder`. Raises UserError, and UsageError for settings that do not fit the model."""
    tokenizer = load_tokenizer(folder, trust_remote_code)
    variants = Variants(folder, dtype, device)
    check_lengths(settings.lengths, variants.index_topk, variants.context)
    stop = sorted({*stop_tokens(folder), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    return score_all(variants.session, tokenizer, settings, variants.index_topk, stop, on_progress)


def check_lengths(lengths: Sequence[int], index_topk: int, context: int) -> None:
    """Raises UsageError where a length says nothing, or the model was not made for it."""
    for length in lengths:
        if not index_topk < length <= context:
            raise UsageError(
                f"--lengths {length}: expected more than index_topk {index_topk}, up to which every key is selected, and at most the "
                f"context of {context} tokens"
            )


def score_all(
    open_session: Open, tokenizer: Any, settings: Settings, index_topk: int, stop: Sequence[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> LongResult:  # fmt: skip
    """The same on any sessions."""
    haystack = built_in(settings.seed) if settings.text is None else from_text(settings.text)
    asked = list(
        examples(
            tokenizer, settings.tasks, settings.lengths, settings.depths, settings.samples, settings.seed,
            STYLES[settings.style], haystack,
        )
    )  # fmt: skip
    scores, total, done = list[Score](), len(asked) * len(VARIANTS), 0
    for _, group in groupby(asked, key=lambda example: example.length):
        of_length = list(group)
        for variant in VARIANTS:
            answers = list[Answer]()
            for batch, session in _batches(open_session, variant, of_length, settings.batch):
                answers += ask(session, batch, tokenizer.decode, stop)
                if on_progress is not None:
                    on_progress(done + len(answers), total)
            done += len(answers)
            scores += _scores(variant, of_length, answers)
    return LongResult(tuple(scores), index_topk, haystack.origin, settings)


def _batches(
    open_session: Open, variant: str, asked: Sequence[Example], size: int
) -> Iterator[tuple[Sequence[Example], Session]]:
    """Prompts of one length, with a session that is as wide; the last may need a narrower one."""
    session: Session | None = None
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        if session is None or session.batch != len(batch):
            session = open_session(variant, len(batch), asked[0].length)
        yield batch, session


def _scores(variant: str, asked: Sequence[Example], answers: Sequence[Answer]) -> Iterator[Score]:
    pairs = zip(asked, answers, strict=True)
    for (task, length, depth), group in groupby(pairs, key=lambda pair: (pair[0].task, pair[0].length, pair[0].depth)):
        found = list(group)
        shares = torch.tensor([100 * answer.found for _, answer in found], dtype=torch.float64)
        error = float(shares.std() / len(shares) ** 0.5) if len(shares) > 1 else math.nan
        tokens = sum(len(example.answer) for example, _ in found)
        logprob = sum(answer.logprob for _, answer in found) / tokens
        exact = 100 * sum(answer.exact for _, answer in found) / len(found)
        yield Score(variant, task, length, depth, len(found), float(shares.mean()), error, logprob, exact)


def gate_names(settings: Settings) -> list[str]:
    """Limits that --gate may set: percentage points that DSA may lose to dense on a group of tasks, on one, or on all; and nats a
    token of the right answer, where -logprob is added."""
    groups = dict.fromkeys([ALL, *(TASKS[task].group for task in settings.tasks), *settings.tasks])
    return [*groups, *(f"{name}-logprob" for name in groups)]


def long_checks(result: LongResult, gates: Mapping[str, float]) -> list[Check]:
    """The user's limits, at every length by itself. One that not even an answerless model could miss fails: it proves nothing."""
    names = set(gate_names(result.settings))
    checks = []
    for name, limit in ((name, limit) for name, limit in gates.items() if name in names):
        task = name.removesuffix("-logprob")
        for length in result.settings.lengths:
            figure = result.accuracy if task == name else result.logprob
            dense, dsa = (figure(task, length, variant) for variant in ("dense", "dsa"))
            checks.append(_held(name, task == name, length, dense, dsa, limit))
    return checks


def _held(name: str, points: bool, length: int, dense: float, dsa: float, limit: float) -> Check:
    unit, lost = ("points of accuracy", dense - dsa) if points else ("nats a token", dense - dsa)
    label = f"{name} at {length} tokens: {unit} lost to dense"
    if points and dense <= limit:
        detail = f"dense itself answers {dense:.3g}%, so that nothing is shown"
        return Check(label, False, lost, limit, detail, "choose tasks, a style or lengths that the dense model masters")
    return Check(label, lost <= limit, lost, limit, f"dense {dense:.4g}, DSA {dsa:.4g}", CALIBRATE_BETTER)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
