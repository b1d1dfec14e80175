"""plan, convert, strip: from a dense checkpoint to a DSA checkpoint and back."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..runtime.processes import processes
from .common import MODEL_HELP, add_drop_stale, add_trust, command_parser
from .cost import add_cost, cost_of, cost_wanted
from .parser import a_name, a_path


def add_conversion(commands: Any) -> None:
    """plan, convert, strip."""
    _add_plan(commands)
    _add_convert(commands)
    _add_strip(commands)


def add_recipe(command: argparse.ArgumentParser) -> None:
    """The settings of an indexer, which `read_recipe_of` reads."""
    group = command.add_argument_group("indexer")
    group.add_argument(
        "--recipe", metavar="FILE", type=a_name, help="YAML file with any of these settings and more (docs/recipe.md)"
    )
    group.add_argument(
        "--indexer", metavar="SOURCE",
        help="auto (default: closed form, then distillation where that leaves a gap and there is text), closed-form, distil, or "
        "donor:PATH",
    )  # fmt: skip
    group.add_argument(
        "--budget",
        metavar="AMOUNT",
        help="what distillation may take in all: 10m, 1.5h, '500000 tokens' or '2000 steps'",
    )
    group.add_argument("--index-topk", type=int, metavar="K", help="past tokens each query attends to (default 2048)")
    group.add_argument(
        "--index-n-heads", type=int, metavar="H", help="index heads (default: the model's heads, at most 64)"
    )
    group.add_argument("--index-head-dim", type=int, metavar="D", help="width of an index head (default 128)")


def add_layout(command: argparse.ArgumentParser) -> None:
    """What the result is written as; settings of the recipe, too."""
    group = command.add_argument_group("layout")
    group.add_argument(
        "--layout", choices=("auto", "deepseek_v32", "glm_moe_dsa", "own"),
        help="what the result is written as: a DSA class of other runtimes, or own, the dense checkpoint with the indexers "
        "beside (default auto: deepseek_v32 where the model fits, glm_moe_dsa with --share, else own)",
    )  # fmt: skip
    group.add_argument(
        "--mtp",
        choices=("keep", "drop"),
        help="multi-token-prediction layers; only a donor has indexers for them (default keep)",
    )
    group.add_argument(
        "--untie", action="store_true", default=None, help="write lm_head out where it is tied to the embedding"
    )
    group.add_argument(
        "--share", metavar="LAYERS",
        help="layers without an indexer of their own, which attend to what the last layer before them selected (glm_moe_dsa and own): "
        "auto, as many as cost no more than share_loss (0.005 nats a token) on held-out text; or their numbers, as in 2,3,5",
    )  # fmt: skip
    group.add_argument(
        "--target", metavar="NAMES",
        help="runtimes that must load the result, as in vllm,sglang (docs/targets.md): refused at once where one would not; lm_head "
        "is written out for those that need it",
    )  # fmt: skip


def add_partial(command: argparse.ArgumentParser) -> None:
    """For models that have other attention, too."""
    command.add_argument(
        "--allow-partial",
        action="store_true",
        help="take a model that has other attention beside MLA, which stays as it is",
    )


def read_recipe_of(args: argparse.Namespace) -> Any:
    """The Recipe that the arguments ask for."""
    from ..optimizer.recipe import read_recipe

    fields = (
        "indexer",
        "budget",
        "index_topk",
        "index_n_heads",
        "index_head_dim",
        "calibration",
        "tokens",
        "layout",
        "mtp",
        "untie",
        "target",
        "share",
    )
    return read_recipe(args.recipe, {name: getattr(args, name, None) for name in fields})


def _add_plan(commands: Any) -> None:
    command = command_parser(
        commands,
        "plan",
        _plan,
        "show what a conversion would do, and why not; reads no weight",
        "mla2dsa plan ./model",
        graphs=True,
    )
    command.add_argument("model", metavar="MODEL", type=a_name, help=MODEL_HELP)
    add_partial(command)
    add_drop_stale(command)
    add_recipe(command)
    add_layout(command)
    add_cost(command)


def _plan(args: argparse.Namespace) -> int:
    from ..files.model.hub import planned_folder
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_plan

    recipe, priced = read_recipe_of(args), cost_wanted(args)
    with planned_folder(args.model) as folder:
        with Findings() as found:  # before torch is imported, which takes seconds
            check_plan(found, folder, recipe, args.drop_stale_quantization)

        from ..optimizer.plan import prepare

        prepared = prepare(folder, recipe, args.allow_partial, drop_stale=args.drop_stale_quantization)

    from .show.conversion import plan_json, show_plan
    from .show.cost import show_cost
    from .show.tables import print_json

    plan, cost = replace(prepared.plan, model=args.model), cost_of(args, prepared) if priced else None
    if args.json:
        print_json(plan_json(plan) | ({} if cost is None else {"cost": cost}))
        return 0
    show_plan(plan)
    if cost is not None:
        show_cost(cost)
    return 0


def _add_convert(commands: Any) -> None:
    example = "mla2dsa convert ./model ./model-dsa --calibration ./texts --budget 30m"
    command = command_parser(
        commands,
        "convert",
        _convert,
        "write the DSA checkpoint of a dense MLA checkpoint, verified",
        example,
        graphs=True,
        together=True,
    )
    command.add_argument("model", metavar="MODEL", type=a_name, help=MODEL_HELP)
    command.add_argument("out", metavar="OUT", type=a_path, help="folder to write")
    add_recipe(command)
    add_layout(command)
    add_partial(command)
    command.add_argument(
        "--calibration",
        metavar="PATH",
        type=a_name,
        help="text file, folder of text, or .jsonl (default: random tokens)",
    )
    command.add_argument(
        "--tokens", type=int, metavar="N", help="how much of it to use (default 64 sequences; 16 for closed-form)"
    )
    command.add_argument("--device", default="cpu", help="where the model is streamed through (default cpu)")
    existing = command.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with an unfinished conversion")
    existing.add_argument("--overwrite", action="store_true", help="replace OUT, or an unfinished conversion")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    command.add_argument("--skip-verification", action="store_true", help="write the result without proving it")
    command.add_argument(
        "--skip-transformers", action="store_true", help="no comparison with transformers: less time and memory"
    )
    add_trust(command)
    add_drop_stale(command)


def _convert(args: argparse.Namespace) -> int:
    if not processes().first:
        return _convert_with_others(args)
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_conversion

    with Findings() as found:  # before torch is imported, which takes seconds
        recipe = found.collect(read_recipe_of, args)
        check_conversion(
            found, args.model, args.out, recipe, overwrite=args.overwrite, drop_stale=args.drop_stale_quantization,
            calibration=args.calibration,
        )  # fmt: skip
    assert recipe is not None  # or its error was raised

    from ..optimizer.convert import convert, dry_run
    from .show.conversion import Progress, plan_json, show_layers, show_plan, show_sharing, show_verification
    from .show.tables import print_json

    if args.dry_run:
        plan = dry_run(
            args.model, args.out, recipe, resume=args.resume, overwrite=args.overwrite,
            trust_remote_code=args.trust_remote_code, drop_stale=args.drop_stale_quantization,
            allow_partial=args.allow_partial,
        )  # fmt: skip
        print_json(plan_json(plan)) if args.json else show_plan(plan)
        return 0
    with Progress() as progress:
        outcome = convert(args.model, args.out, recipe, **_options(args), listener=progress.listener())
    if args.json:
        print_json(outcome.report)
        return 0
    show_plan(outcome.plan)
    show_layers(outcome.layers, outcome.report)
    show_sharing(outcome.report["sharing"])
    if outcome.verification is not None:
        show_verification(outcome.verification, layers=False)
    print(f"{args.out}: written in {outcome.report['seconds']:.0f} s{'' if outcome.verification else ', NOT verified'}")
    if outcome.verification is not None:
        print(_drawn(args.out))
    return 0


def _drawn(out: Path) -> str:
    from ..exporters.dsa.names import PAGE
    from ..exporters.report.plots import INSTALL, can_draw

    if (out / PAGE).exists():
        return f"{out / PAGE}: the same with plots"
    if can_draw():
        return f"no {PAGE}: it could not be drawn; `mla2dsa report {out} page.html` says why"
    return f"no {PAGE}: its plots need matplotlib; {INSTALL}"


def _convert_with_others(args: argparse.Namespace) -> int:
    """What a process does that is not the first: it computes, and says nothing."""
    recipe = read_recipe_of(args)
    if not args.dry_run:
        from ..optimizer.convert import convert

        convert(args.model, args.out, recipe, **_options(args))
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "resume": args.resume, "overwrite": args.overwrite, "device": args.device,
        "skip_verification": args.skip_verification, "skip_transformers": args.skip_transformers,
        "trust_remote_code": args.trust_remote_code, "drop_stale": args.drop_stale_quantization,
        "allow_partial": args.allow_partial,
    }  # fmt: skip


def _add_strip(commands: Any) -> None:
    command = command_parser(
        commands, "strip", _strip, "give the dense checkpoint back, bit for bit", "mla2dsa strip ./model-dsa ./model"
    )
    command.add_argument("dsa", metavar="DSA", type=a_path, help="folder that mla2dsa convert wrote")
    command.add_argument("out", metavar="OUT", type=a_path, help="folder to write")
    command.add_argument("--overwrite", action="store_true", help="replace OUT")


def _strip(args: argparse.Namespace) -> int:
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_strip

    with Findings() as found:
        check_strip(found, args.dsa, args.out, args.overwrite)

    from ..exporters.dsa.strip import not_restored, strip
    from .show.tables import print_json

    out, missing = strip(args.dsa, args.out, overwrite=args.overwrite), not_restored(args.dsa)
    if args.json:
        print_json({"out": str(out), "left_out": missing})
        return 0
    print(f"{out}: the dense checkpoint again, bit for bit")
    if missing:
        print(f"not in it, since the conversion took what belongs to the model only: {', '.join(missing)}")
    return 0
