"""plan --cost: its options, and what they ask for."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..errors import UsageError

_NEED_COST = ("gpu", "price", "batch", "speculative")


def add_cost(command: argparse.ArgumentParser) -> None:
    """Options that `cost_wanted` checks and `cost_of` reads."""
    group = command.add_argument_group("cost")
    group.add_argument(
        "--cost", action="store_true",
        help="what serving would cost by position, dense and DSA: a roofline (docs/cost.md)",
    )  # fmt: skip
    group.add_argument("--gpu", metavar="NAME", help="a100, h100 (default), h800, h200 or b200")
    group.add_argument("--price", type=float, metavar="DOLLARS", help="of one GPU for an hour (default 2.0)")
    group.add_argument(
        "--batch", type=int, metavar="N",
        help="sequences decoded at once, on all GPUs together (default: so many that reading weights is no matter)",
    )  # fmt: skip
    group.add_argument(
        "--speculative", action="store_true", default=None,
        help="decode with one token guessed by multi-token prediction: 1.8 tokens a step",
    )  # fmt: skip


def cost_wanted(args: argparse.Namespace) -> bool:
    """Raises UsageError for options that go with --cost alone, and for values that they do not take."""
    from ..optimizer.cost.gpus import gpu_of

    given = [f"--{name}" for name in _NEED_COST if getattr(args, name) is not None]
    if given and not args.cost:
        raise UsageError(f"{given[0]} goes with --cost; add it")
    gpu_of(args.gpu or "h100")
    if args.price is not None and not (args.price > 0 and math.isfinite(args.price)):
        raise UsageError(f"--price {args.price}: expected dollars an hour, more than 0")
    if args.batch is not None and args.batch < 1:
        raise UsageError(f"--batch {args.batch}: expected 1 or more")
    return bool(args.cost)


def cost_of(args: argparse.Namespace, prepared: Any) -> dict[str, Any]:
    """The cost of a prepared plan, as data."""
    from ..optimizer.cost.gpus import gpu_of
    from ..optimizer.cost.roofline import Roofline
    from ..optimizer.cost.shape import shape_of
    from ..optimizer.cost.tables import cost_table

    price = 2.0 if args.price is None else args.price
    model = Roofline(shape_of(prepared), gpu_of(args.gpu or "h100"), price, args.batch, bool(args.speculative))
    return cost_table(model, prepared.plan.context)
