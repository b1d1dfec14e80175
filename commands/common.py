"""What every command's parser is made with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import UsageError

MODEL_HELP = "folder of a checkpoint, or a Hugging Face hub id"


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in one line like every other."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def architectures(text: str) -> tuple[int, ...]:
    """The value of --sm: 80,90 or sm_80,sm_90. Raises UsageError."""
    try:
        return tuple(int(part.strip().removeprefix("sm_")) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--sm {text}: expected numbers with commas between, as 80,90") from None


def command_parser(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, example: str
) -> argparse.ArgumentParser:
    """A command that calls `run` with its arguments, and takes --json. about: a phrase, without a full stop."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return command
