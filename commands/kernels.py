"""kernels build, kernels list: the GPU kernels, compiled ahead of time."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UsageError
from .common import architectures, command_parser
from .parser import a_path


def add_kernels(commands: Any) -> None:
    """kernels, with its own commands."""
    about = "compile the GPU kernels ahead of time, or list them"
    group = commands.add_parser(
        "kernels", help=about, description=about[0].upper() + about[1:] + ".",
        epilog="examples:\n  mla2dsa kernels build --sm 90 --out ./kernels\n  mla2dsa kernels list ./kernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    group.set_defaults(parser=group)
    inner = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_build(inner)
    _add_list(inner)


def _add_build(commands: Any) -> None:
    about = "compile every kernel for GPU architectures into a folder with a manifest; needs no GPU"
    example = "mla2dsa kernels build --sm 80,90,100 --out ./kernels"
    command = command_parser(commands, "build", _build, about, example)
    command.add_argument("--out", metavar="DIR", type=a_path, required=True, help="folder to write")
    command.add_argument(
        "--sm",
        metavar="LIST",
        type=architectures,
        help="architectures, as 80,90 (default: every one that is supported)",
    )
    command.add_argument("--jobs", metavar="N", type=int, help="processes to compile in (default: one per CPU)")
    command.add_argument("--overwrite", action="store_true", help="replace the pack in DIR")


def _build(args: argparse.Namespace) -> int:
    from ..optimizer.kernel_packs import build
    from .show.conversion import Progress
    from .show.kernels import show_build
    from .show.tables import print_json

    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: expected 1 or more")
    with Progress() as progress:
        built = build(args.out, args.sm, args.jobs, overwrite=args.overwrite, on_progress=progress.advance)
    print_json(built) if args.json else show_build(built)
    return 0


def _add_list(commands: Any) -> None:
    about = "the kernels of a pack with their resources, or those that would be built"
    command = command_parser(commands, "list", _list, about, "mla2dsa kernels list ./kernels")
    command.add_argument("pack", metavar="DIR", type=a_path, nargs="?", help="folder that mla2dsa kernels build wrote")


def _list(args: argparse.Namespace) -> int:
    from ..optimizer.kernel_packs import list_catalogue, list_pack
    from .show.kernels import show_kernels
    from .show.tables import print_json

    kernels = list_catalogue() if args.pack is None else list_pack(args.pack)
    print_json({"kernels": kernels}) if args.json else show_kernels(kernels)
    return 0
