"""recipe init: a recipe's file to begin with."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import MODEL_HELP, command_parser
from .parser import a_name, a_path


def add_recipes(commands: Any) -> None:
    """recipe, with its own command."""
    about = "write a recipe.yaml to begin with"
    group = commands.add_parser(
        "recipe", help=about, description=about[0].upper() + about[1:] + ".",
        epilog="example:\n  mla2dsa recipe init ./model -o recipe.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    group.set_defaults(parser=group)
    inner = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
    about = "write a recipe with every field, its default and what it does; never over a file"
    command = command_parser(inner, "init", _init, about, "mla2dsa recipe init ./model -o recipe.yaml")
    command.add_argument(
        "model", metavar="MODEL", type=a_name, nargs="?", help=f"{MODEL_HELP}: what follows from it is noted (optional)"
    )
    command.add_argument(
        "-o", "--out", metavar="FILE", type=a_path, default=Path("recipe.yaml"),
        help="a new file (default recipe.yaml; - for stdout)",
    )  # fmt: skip


def _init(args: argparse.Namespace) -> int:
    from ..optimizer.recipes.writing import recipe_text, write_recipe
    from .show.tables import print_json

    text = recipe_text(notes=_notes(args.model))
    if str(args.out) == "-":
        print_json({"recipe": text}) if args.json else sys.stdout.write(text)
        return 0
    write_recipe(args.out, text)
    print_json({"out": str(args.out)}) if args.json else print(
        f"{args.out}: every field with its default; for --recipe"
    )
    return 0


def _notes(model: str | None) -> dict[str, str]:
    if model is None:
        return {}
    from ..files.json_files import read_json
    from ..files.model.hub import planned_folder
    from ..files.model.model_files import CONFIG
    from ..files.model.text_model import text_config
    from ..optimizer.recipes.writing import notes_of

    with planned_folder(model) as folder:
        return notes_of(model, text_config(read_json(Path(folder) / CONFIG)))
