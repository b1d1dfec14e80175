"""completion: a script for bash, zsh or fish that completes commands, options and their values."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import Any

from ..compat.argparse_private import actions, commands
from .common import command_parser

_BASH = """# mla2dsa completion bash >> ~/.bash_completion, or: source <(mla2dsa completion bash)
_mla2dsa() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" path="" index known=""
  for ((index = 1; index < COMP_CWORD; index++)); do
    case "$path ${{COMP_WORDS[index]}}" in
{paths}
    esac
  done
  case "$path $before" in
{values}
    *) case "$path" in
{words}
      esac ;;
  esac
  COMPREPLY=($(compgen -W "$known" -- "$word"))
}}
complete -o default -F _mla2dsa mla2dsa
"""


def add_completion(commands: Any) -> None:
    """completion."""
    about = "print a script that completes commands and options in your shell"
    example = "source <(mla2dsa completion bash)\n  mla2dsa completion fish > ~/.config/fish/completions/mla2dsa.fish"
    command = command_parser(commands, "completion", _completion, about, example)
    command.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")


def _completion(args: argparse.Namespace) -> int:
    from .show.tables import print_json

    script = (_fish if args.shell == "fish" else _bash)(args.parser_of_all)
    if args.shell == "zsh":
        script = f"autoload -U +X bashcompinit && bashcompinit\n{script}"
    print_json({"shell": args.shell, "script": script}) if args.json else print(script, end="")
    return 0


def parsers(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with its words, " kernels build", the whole one first, as "" ."""
    yield path, parser
    for name, below in commands(parser).items():
        yield from parsers(below, f"{path} {name}")


def _bash(parser: argparse.ArgumentParser) -> str:
    paths, values, words = [], [], []
    for path, one in parsers(parser):
        if path:
            paths.append(f"      {_quoted(path)}) path={_quoted(path)} ;;")
        options = [option for action in actions(one) for option in action.option_strings]
        words.append(f"        {_quoted(path)}) known={_quoted(' '.join([*commands(one), *options]))} ;;")
        for action in actions(one):
            if action.option_strings and action.choices:
                cases = "|".join(_quoted(f"{path} {option}") for option in action.option_strings)
                values.append(f"    {cases}) known={_quoted(' '.join(map(str, action.choices)))} ;;")
    return _BASH.format(paths="\n".join(paths), values="\n".join(values), words="\n".join(words))


def _fish(parser: argparse.ArgumentParser) -> str:
    lines = ["complete -c mla2dsa -f -n __fish_use_subcommand"]
    for path, one in parsers(parser):
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in path.split()) or "__fish_use_subcommand"
        where = f"complete -c mla2dsa -n {_quoted(seen)}"
        for name, below in commands(one).items():
            lines.append(f"{where} -a {name} -d {_quoted(below.description or '')}")
        for action in actions(one):
            long = [option for option in action.option_strings if option.startswith("--")]
            choices = f" -x -a {_quoted(' '.join(map(str, action.choices)))}" if action.choices else ""
            lines += [f"{where} -l {option[2:]}{choices} -d {_quoted(action.help or '')}" for option in long]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return shlex.quote(text) if text else "''"
