"""`verify --long`: its options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import UsageError

if TYPE_CHECKING:
    from ..optimizer.proof.long_tasks import LongTasks

TASKS = ("needle", "multi-key", "multi-value", "variables", "common-words")
_UNITS = {"k": 1024, "m": 1024**2}
T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """The options, read. None: not given."""

    kinds: tuple[str, ...] | None
    lengths: tuple[int, ...] | None
    depths: tuple[float, ...] | None
    questions: int | None
    most_lost: float | None
    seed: int | None


def add_long(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("questions about long texts, in the manner of RULER")
    group.add_argument("--long", action="store_true", help="ask them, of dense, DSA, oracle and window")
    group.add_argument("--tasks", metavar="TASK,...", help=f"which (default all: {','.join(TASKS)})")
    group.add_argument("--lengths", metavar="N,...", help="tokens, as 4k,8k (default the context, and a quarter of it)")
    group.add_argument("--depths", metavar="P,...", help="where the answer stands, per cent (default 0,25,50,75,100)")
    group.add_argument("--questions", type=int, metavar="N", help="of each task at each length (default 20)")
    group.add_argument(
        "--gate", type=float, metavar="POINTS", help="most accuracy that DSA may lose to dense (default 2)"
    )
    group.add_argument("--task-seed", type=int, metavar="N", help="of names, numbers and texts (default 0)")


def read_long(args: argparse.Namespace) -> Asked | None:
    """None without --long. Raises UsageError for an option that says nothing."""
    given = [
        name
        for name in ("tasks", "lengths", "depths", "questions", "most_lost", "task_seed")
        if getattr(args, name) is not None
    ]
    if not args.long:
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} is about questions, which --long asks; pass --long")
        return None
    if args.questions is not None and args.questions < 1:
        raise UsageError(f"--questions {args.questions}, expected at least 1")
    return Asked(
        _each("--tasks", args.tasks, _task), _each("--lengths", args.lengths, _tokens), _each("--depths", args.depths, _depth),
        args.questions, args.most_lost, args.task_seed,
    )  # fmt: skip


def long_tasks_of(asked: Asked | None) -> LongTasks | None:
    from ..optimizer.proof.long_tasks import LongTasks

    if asked is None:
        return None
    return LongTasks(**{name: value for name, value in vars(asked).items() if value is not None})


def _each(flag: str, text: str | None, read: Callable[[str], T]) -> tuple[T, ...] | None:
    if text is None:
        return None
    try:
        return tuple(read(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{flag} {text}: {error}") from None


def _task(text: str) -> str:
    if text not in TASKS:
        raise ValueError(f"{text!r} is no task, expected some of {','.join(TASKS)}")
    return text


def _tokens(text: str) -> int:
    number, unit = (text[:-1], _UNITS[text[-1].lower()]) if text[-1:].lower() in _UNITS else (text, 1)
    if not number.isdecimal() or not int(number):
        raise ValueError(f"{text!r} is no number of tokens, expected something like 4096 or 4k")
    return int(number) * unit


def _depth(text: str) -> float:
    if not text.isdecimal() or not int(text) <= 100:
        raise ValueError(f"{text!r} is no depth, expected 0 to 100 per cent")
    return int(text) / 100
