"""argparse with its complaints in one line: the right --help, and what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..compat.argparse_private import options
from ..errors import UsageError, short

_NUMBER = re.compile(r"([0-9]{1,18})([kK]?)")


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations: a script that says --over would change its meaning with the next option.

    intermixed: arguments of any number may stand after options.
    """

    intermixed = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's own takes them all before the first option, or none."""
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # argparse calls this again
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Raises UsageError for words that this command does not take."""
        near = [near_to(word.partition("=")[0], options(self)) for word in words if word.startswith("--")]
        self.error(f"unrecognized arguments: {' '.join(words)}{''.join(near)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own, with what was probably meant."""
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}{near_to(str(value), action.choices)} (choose from {known})"
            )


def a_name(text: str) -> str:
    """The type of arguments that are a path or a hub id. An empty one is a shell variable without a value, and would mean the folder
    that one happens to be in."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found none (is a shell variable empty?)")
    return text


def a_path(text: str) -> Path:
    """The type of arguments that are a path."""
    return Path(a_name(text))


def read_numbers(flag: str, text: str) -> tuple[int, ...]:
    """4k,8192 as numbers; k is 1024. Raises UsageError."""
    parts = [_NUMBER.fullmatch(part.strip()) for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{flag} {short(text)}: expected numbers with commas between, as in 4k,8k or 0,50,100")
    return tuple(int(part[1]) * (1024 if part[2] else 1) for part in parts if part)


def near_to(word: str, known: Iterable[Any]) -> str:
    """`, did you mean X?` for the nearest of what is known, or nothing where none is near."""
    names = list(map(str, known))
    begun = [name for name in names if len(word) > 4 and name.startswith(word)]
    found = begun or difflib.get_close_matches(word, names, n=1, cutoff=0.65)
    return f", did you mean {found[0]}?" if found else ""
