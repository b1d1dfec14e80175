"""bench: how fast models are, side by side."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UsageError
from .answers import MODEL, RUNTIMES, add_dtype
from .common import command_parser
from .parser import a_name, read_numbers


def add_bench(commands: Any) -> None:
    """bench."""
    example = "mla2dsa bench ./model ./model-dsa --context 4k,16k\n  mla2dsa bench ./engine --context 32k"
    about = "time prefill and decode of models side by side: checkpoints, exported folders, engines"
    command = command_parser(commands, "bench", _bench, about, example)
    command.add_argument(
        "models", metavar="MODEL", nargs="+", type=a_name, help=f"{MODEL}; the others are compared with the first"
    )
    command.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default 1)")
    command.add_argument(
        "--context", metavar="L", help="tokens of prefill, as in 4k,32k (default 4k, or what the first model takes)"
    )
    command.add_argument("--tokens", type=int, default=64, metavar="N", help="decode steps to time (default 64)")
    command.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="times that every model is run, in turn (default 3)"
    )
    command.add_argument("--runtime", choices=RUNTIMES, help="default: that of the folder, torch for a checkpoint")
    command.add_argument("--device", default="cpu", help="where torch runs (default cpu)")
    add_dtype(command)


def _bench(args: argparse.Namespace) -> int:
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_generate

    contexts = read_numbers("--context", args.context) if args.context is not None else (None,)
    if len(set(contexts)) != len(contexts):
        raise UsageError(f"--context {args.context}: a length is given twice")
    with Findings() as found:  # before a process is started that imports torch
        check_generate(found, args.models, args.runtime, args.dtype)

    from ..optimizer.bench import bench
    from .show.bench import show_bench
    from .show.progress import Bars
    from .show.tables import print_json

    with Bars() as progress:
        result = bench(
            args.models, contexts, batch=args.batch, tokens=args.tokens, rounds=args.rounds, runtime=args.runtime,
            device=args.device, dtype=args.dtype, on_progress=progress.advance,
        )  # fmt: skip
    print_json(result) if args.json else show_bench(result)
    return 0
