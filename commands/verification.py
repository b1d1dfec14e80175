"""verify: a DSA checkpoint against the dense one."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UsageError
from .common import add_drop_stale, add_trust, command_parser
from .conversion import add_partial
from .parser import a_name, a_path, read_numbers


def add_verify(commands: Any) -> None:
    """verify."""
    about = "hold a DSA checkpoint against the dense one it was made from"
    example = "mla2dsa verify ./model ./model-dsa --text held-out.txt"
    command = command_parser(commands, "verify", _verify, about, example, graphs=True)
    command.add_argument("dense", metavar="DENSE", type=a_path, help="folder of the dense checkpoint")
    command.add_argument("dsa", metavar="DSA", type=a_path, help="folder of the DSA checkpoint")
    command.add_argument(
        "--text", metavar="PATH", type=a_name, help="held-out text: file, folder or .jsonl (default: random tokens)"
    )
    command.add_argument(
        "--foreign-text",
        metavar="PATH",
        type=a_name,
        help="text of another domain than the calibration's: every figure is given for it, too",
    )
    command.add_argument("--sequences", type=int, metavar="N", help="sequences to look at (default 8)")
    command.add_argument(
        "--sequence-length", type=int, metavar="L", help="tokens of a sequence (default 4 * index_topk, at least 1024)"
    )
    command.add_argument(
        "--max-loss-delta", type=float, default=None, metavar="X", help="most loss increase, nats/token (default 0.05)"
    )
    command.add_argument(
        "--gate", action="append", default=[], metavar="NAME=LIMIT",
        help="fail where a figure is above its limit, as in few-positive=0.01 or needle=2; may be repeated (docs/quality.md)",
    )  # fmt: skip
    command.add_argument(
        "--report", metavar="FILE", type=a_path, help="write what was found as a page with plots, too: a new HTML file"
    )
    _add_long(command)
    command.add_argument("--device", default="cpu", help="where the models are streamed through (default cpu)")
    command.add_argument("--skip-transformers", action="store_true", help="no comparison with transformers")
    add_partial(command)
    add_trust(command)
    add_drop_stale(command)


def _add_long(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("long-context tasks (docs/quality.md)")
    group.add_argument(
        "--long",
        action="store_true",
        help="hide things in long texts, too, and ask for them: dense, DSA, oracle and window",
    )
    group.add_argument(
        "--lengths", metavar="L", help="tokens of a prompt with its answer, as in 4k,8k (default 4k, or the context)"
    )
    group.add_argument("--depths", metavar="D", help="percent of the text before a needle (default 0,25,50,75,100)")
    group.add_argument(
        "--tasks", metavar="NAMES", help="some of single,multi-key,multi-value,variables,common-words (default: all)"
    )
    group.add_argument("--samples", type=int, metavar="N", help="prompts of each task, length and depth (default 5)")
    group.add_argument("--seed", type=int, metavar="N", help="of the prompts (default 0)")
    group.add_argument(
        "--style", metavar="NAME", help="wording: prose (default), as RULER's, or code, for models of code"
    )
    group.add_argument(
        "--haystack", metavar="PATH", type=a_name, help="text to hide things in (default: built-in sentences)"
    )
    group.add_argument("--batch", type=int, metavar="N", help="prompts answered at once (default 1)")


def _long_settings(args: argparse.Namespace) -> Any:
    """What --long asks for; None without it. Raises UsageError."""
    given = {name: getattr(args, name) for name in ("samples", "seed", "style", "batch")}
    given = {name: value for name, value in {**given, "text": args.haystack}.items() if value is not None}
    lists = {name: getattr(args, name) for name in ("lengths", "depths", "tasks") if getattr(args, name) is not None}
    if not args.long:
        if flags := [*lists, *("haystack" if name == "text" else name for name in given)]:
            raise UsageError(f"--{flags[0]} is of the long-context tasks: pass --long, too")
        return None

    from ..optimizer.model.cached_model import context_of
    from ..optimizer.model.checkpoint import Checkpoint
    from ..optimizer.proof.tasks.long import LONG, Settings

    numbers: dict[str, Any] = {
        name: read_numbers(f"--{name}", lists[name]) for name in ("lengths", "depths") if name in lists
    }
    tasks: dict[str, Any] = {"tasks": tuple(lists["tasks"].split(","))} if "tasks" in lists else {}
    if "lengths" not in numbers:
        numbers["lengths"] = (min(LONG, context_of(Checkpoint.open(args.dsa))),)
    return Settings(**numbers, **tasks, **given)


def _verify(args: argparse.Namespace) -> int:
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_verify

    with Findings() as found:
        check_verify(found, args.dense, args.dsa, args.text, args.foreign_text, args.haystack)
    long = _long_settings(args)
    if args.report:
        from ..exporters.report.plots import check_library
        from .report import check_page, write_page

        check_page(args.report)
        check_library()

    from ..optimizer.verify import FailedVerification, verify_folders
    from .show.conversion import Progress, show_verification
    from .show.tables import print_json

    with Progress() as progress:
        result = verify_folders(
            args.dense, args.dsa, args.text, sequences=args.sequences, sequence_length=args.sequence_length,
            max_loss_delta=args.max_loss_delta, foreign_text=args.foreign_text, gates=args.gate, long=long,
            skip_transformers=args.skip_transformers, device=args.device,
            trust_remote_code=args.trust_remote_code, drop_stale=args.drop_stale_quantization, allow_partial=args.allow_partial,
            on_progress=progress.advance,
        )  # fmt: skip
    print_json(result.to_json()) if args.json else show_verification(result)
    if args.report:
        write_page(result.to_json(), args.report, args.dsa)
    if not result.passed:
        raise FailedVerification(result)
    return 0
