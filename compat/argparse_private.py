"""What we use of argparse without its promise: which options and commands a parser has."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from .private_names import Library

ARGPARSE = Library(
    "argparse",
    "that of Python 3.11 to 3.14",
    names={"argparse:_SubParsersAction": "the commands of a parser"},
    attributes={
        "ArgumentParser._actions": "what completion offers",
        "ArgumentParser._option_string_actions": "which option was probably meant",
    },
)


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Of its options, arguments and commands, in their order."""
    return list(ARGPARSE.get(parser, "ArgumentParser._actions"))


def options(parser: argparse.ArgumentParser) -> Mapping[str, argparse.Action]:
    """By every spelling, "-v" and "--verbose"."""
    found: Mapping[str, argparse.Action] = ARGPARSE.get(parser, "ArgumentParser._option_string_actions")
    return found


def commands(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The parsers of its commands, by name."""
    kind = ARGPARSE.find("argparse:_SubParsersAction")
    groups = (action for action in actions(parser) if isinstance(action, kind))
    return {name: below for group in groups for name, below in (group.choices or {}).items()}
