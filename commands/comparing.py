"""compare: a dense model and its DSA one on the same prompts."""

from __future__ import annotations

import argparse
from typing import Any

from .answers import RUNTIMES, add_dtype, add_prompts, check_prompts, prompts_of
from .common import add_trust, command_parser
from .parser import a_name


def add_compare(commands: Any) -> None:
    """compare."""
    example = 'mla2dsa compare ./model ./model-dsa "def main():" --max-new-tokens 32'
    about = "what a dense model and its DSA one say to the same prompts, and how far apart they are by position"
    command = command_parser(commands, "compare", _compare, about, example, graphs=True, intermixed=True)
    command.add_argument("dense", metavar="DENSE", type=a_name, help="the dense checkpoint: folder or hub id")
    command.add_argument(
        "dsa", metavar="DSA", type=a_name, help="what was made of it: checkpoint, exported folder or engine folder"
    )
    add_prompts(command, "--prompts")
    command.add_argument(
        "--runtime", choices=RUNTIMES, help="of DSA; default: that of the folder, torch for a checkpoint"
    )
    command.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens a text (default 64)")
    command.add_argument("--device", default="cpu", help="where torch runs (default cpu)")
    add_dtype(command)
    add_trust(command)


def _compare(args: argparse.Namespace) -> int:
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_generate
    from ..optimizer.generate import check_count

    check_prompts(args)
    check_count(args.max_new_tokens)
    with Findings() as found:
        check_generate(found, [args.dense], "torch", args.dtype)
        check_generate(found, [args.dsa], args.runtime)

    from ..optimizer.answers.compare import compare, open_both
    from .show.answers import comparisons_json, show_comparison
    from .show.tables import print_json

    prompts = prompts_of(args)
    both = open_both(args.dense, args.dsa, args.runtime, args.device, args.trust_remote_code, args.dtype)
    told = []
    for one in compare(both, prompts, args.max_new_tokens, chat=args.chat, system=args.system):
        told.append(one)
        if not args.json:
            show_comparison(one, both.index_topk)
    if args.json:
        print_json(comparisons_json(told, both.index_topk))
    return 0
