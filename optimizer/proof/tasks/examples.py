"""Prompts that fill a length in a tokenizer's own tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import UsageError
from .prompts import TASKS, Ground, Prompt, Style
from .words import Haystack

EXTRA = 8  # tokens that an answer may be longer than the shortest right one: a word, a comma, a line end
_PROBE = 64  # lines by which the mean of a line is told
_STEPS = 8  # the guess is off by a line or two after three


@dataclass(frozen=True)
class Example:
    """prompt, answer: tokens; together with EXTRA no more than `length`. depth: in percent, None where the task has none."""

    task: str
    length: int
    depth: int | None
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    wanted: tuple[str, ...]


def examples(
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[int],
    samples: int,
    seed: int,
    style: Style,
    haystack: Haystack,
) -> Iterator[Example]:
    """In order of length, task, depth. The same for the same arguments. Raises UsageError where a length is too short for a task."""
    for length in lengths:
        for task in tasks:
            for depth in depths if TASKS[task].deep else (None,):
                ground = Ground(style, haystack, (depth or 0) / 100)
                for number in range(samples):
                    yield _example(tokenizer, task, length, depth, f"{seed} {task} {length} {depth} {number}", ground)


def _example(tokenizer: Any, task: str, length: int, depth: int | None, seed: str, ground: Ground) -> Example:
    """As large as fits: sizes are guessed from what a line takes, and halved in between."""

    def made(size: int) -> tuple[Prompt, list[int], list[int]]:
        prompt = TASKS[task].make(random.Random(seed), ground, size)
        return prompt, *split(tokenizer, prompt.text, prompt.answer)

    def used(size: int) -> int:
        _, prompt, answer = made(size)
        return len(prompt) + len(answer) + EXTRA

    least = used(0)
    if least > length:
        raise UsageError(
            f"--lengths {length}: the task {task} takes {least} tokens with no text around it; give longer ones"
        )
    prompt, ids, answer = made(_largest(used, least, length))
    return Example(task, length, depth, tuple(ids), tuple(answer), prompt.wanted)


def _largest(used: Callable[[int], int], least: int, length: int) -> int:
    """Near the largest size that fits: lines differ in length, so it is guessed by their mean and mended."""
    mean = max(1.0, (used(_PROBE) - least) / _PROBE)
    size, best = int((length - least) / mean), 0
    for _ in range(_STEPS):
        over = used(size) - length
        if over <= 0:
            best = max(best, size)
        step = -math.ceil(over / mean) if over > 0 else int(-over / mean)
        if step == 0 or (over <= 0 and size < best):
            break
        size = max(0, size + step)
    return best


def split(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of both, as they are when one follows the other; where a token spans both, each by itself."""
    before, whole = (
        tokenizer(prompt, verbose=False)["input_ids"],
        tokenizer(prompt + answer, verbose=False)["input_ids"],
    )
    if whole[: len(before)] == before and len(whole) > len(before):
        return before, whole[len(before) :]
    return before, tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
