"""argparse_private: the options and commands that a parser was given."""

from __future__ import annotations

import argparse

import pytest

from mla2dsa.compat.argparse_private import ARGPARSE, actions, commands, options
from mla2dsa.compat.private_names import MovedError


def test_a_parser_says_what_it_was_given() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-q", "--quiet", action="store_true")
    below = parser.add_subparsers().add_parser("plan")
    assert options(parser).keys() == {"-h", "--help", "-q", "--quiet"}
    assert [action.option_strings for action in actions(parser)][:2] == [["-h", "--help"], ["-q", "--quiet"]]
    assert commands(parser) == {"plan": below}
    assert commands(below) == {}


def test_a_name_that_is_gone_is_said() -> None:
    with pytest.raises(MovedError, match=r"argparse .* moved ArgumentParser\._actions"):
        ARGPARSE.get(object(), "ArgumentParser._actions")
