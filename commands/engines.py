"""build, deploy: TensorRT engines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .common import MODEL_HELP, add_drop_stale, add_trust, architectures, command_parser
from .conversion import add_recipe, read_recipe_of
from .parser import a_name, a_path


def add_engines(commands: Any) -> None:
    """build, deploy."""
    _add_build(commands)
    _add_deploy(commands)


def _add_build(commands: Any) -> None:
    about = "a TensorRT engine with our plugins from a DSA checkpoint or an ONNX export"
    example = "mla2dsa build ./model-dsa ./engine --max batch=4,cache_length=65536"
    command = command_parser(commands, "build", _build, about, example, graphs=True)
    command.add_argument(
        "source",
        metavar="CKPT_OR_ONNX",
        type=a_name,
        help="DSA checkpoint (folder or hub id), or what mla2dsa export wrote (folder or .onnx file)",
    )
    command.add_argument("out", metavar="OUT", type=a_path, help="folder to write")
    command.add_argument(
        "--onnx-only",
        action="store_true",
        help="write the ONNX model with the plugin's fields for trtexec, build nothing",
    )
    _add_engine_options(command)


def _add_engine_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("engine")
    group.add_argument("--backend", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt", help="default tensorrt")
    group.add_argument(
        "--sm",
        metavar="LIST",
        type=architectures,
        help="GPU architectures, as 80,90 (default: this GPU; for RTX all it knows)",
    )
    for flag, what in (("--min", "least"), ("--opt", "usual"), ("--max", "greatest")):
        group.add_argument(
            flag, metavar="SIZES", help=f"{what} sizes, as batch=1,seq=512,cache_length=32768 or some of these"
        )
    group.add_argument(
        "--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32, when a checkpoint is given"
    )
    group.add_argument("--embed-plugin", action="store_true", help="put the plugin library into the plan, too")
    group.add_argument(
        "--triton-repo",
        action="store_true",
        help="write a Triton Inference Server repository, too; implies --embed-plugin",
    )
    group.add_argument(
        "--no-engine-cache", action="store_true", help="neither look for nor keep the engine in the cache"
    )
    group.add_argument("--jobs", type=int, metavar="N", help="processes to compile kernels in (default: one per CPU)")
    command.add_argument("--overwrite", action="store_true", help="replace OUT")
    command.add_argument("--dry-run", action="store_true", help="say what would be built, and stop")


def _options(args: argparse.Namespace) -> Any:
    from ..exporters.engine.profiles import read_sizes
    from ..optimizer.build_plan import BuildOptions

    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: expected 1 or more")
    return BuildOptions(
        backend=args.backend, sms=args.sm, least=read_sizes("--min", args.min), usual=read_sizes("--opt", args.opt),
        most=read_sizes("--max", args.max), dtype=args.dtype, embed_plugin=args.embed_plugin, triton_repo=args.triton_repo,
        keep=not args.no_engine_cache, overwrite=args.overwrite, jobs=args.jobs,
    )  # fmt: skip


def _build(args: argparse.Namespace) -> int:
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_build

    with Findings() as found:
        check_build(
            found,
            args.source,
            args.out,
            args.dtype,
            overwrite=args.overwrite,
            onnx_only=args.onnx_only,
            cache=_cache(args),
        )

    from ..optimizer.build import build, build_onnx
    from ..optimizer.build_plan import plan_build
    from .show.conversion import Progress
    from .show.engines import show_build_plan, show_built, show_commands
    from .show.tables import print_json

    plan = plan_build(args.source, args.out, _options(args))
    if args.dry_run:
        planned = plan.to_json()
        print_json(planned) if args.json else show_build_plan(planned)
        return 0
    if args.onnx_only:
        with Progress() as progress:
            commands = build_onnx(plan, progress.advance)
        print_json({"out": str(args.out), "commands": commands}) if args.json else show_commands(args.out, commands)
        return 0
    with Progress() as progress:
        built = build(plan, progress.advance)
    print_json(dict(built.manifest)) if args.json else show_built(args.out, built)
    return 0


def _add_deploy(commands: Any) -> None:
    about = "convert if the checkpoint is dense, then export and build, in one go"
    command = command_parser(
        commands, "deploy", _deploy, about, "mla2dsa deploy ./model ./engine --calibration ./texts", graphs=True
    )
    command.add_argument("model", metavar="CKPT", type=a_name, help=MODEL_HELP)
    command.add_argument("out", metavar="OUT", type=a_path, help="folder to write")
    add_recipe(command)
    command.add_argument(
        "--calibration", metavar="PATH", type=a_name, help="text for the conversion (default: random tokens)"
    )
    command.add_argument("--tokens", type=int, metavar="N", help="how much of it to use")
    command.add_argument("--keep-checkpoint", metavar="DIR", type=a_path, help="keep the DSA checkpoint there")
    command.add_argument(
        "--skip-transformers", action="store_true", help="no comparison with transformers: less time and memory"
    )
    command.add_argument("--device", default="cpu", help="where the model is streamed through (default cpu)")
    add_trust(command)
    add_drop_stale(command)
    _add_engine_options(command)


def _cache(args: argparse.Namespace) -> Path | None:
    """Where engines are kept, unless they are not."""
    from ..files.user_cache import cache_folder

    return None if args.no_engine_cache else cache_folder()


def _deploy(args: argparse.Namespace) -> int:
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_deploy

    with Findings() as found:
        recipe = found.collect(read_recipe_of, args)
        check_deploy(
            found, args.model, args.out, recipe, args.dtype, keep_checkpoint=args.keep_checkpoint, overwrite=args.overwrite,
            drop_stale=args.drop_stale_quantization, calibration=args.calibration, cache=_cache(args),
        )  # fmt: skip
    assert recipe is not None  # or its error was raised

    from ..optimizer.deploy import deploy, plan_deploy
    from .show.conversion import Progress
    from .show.engines import show_build_plan, show_built
    from .show.tables import print_json

    options = _options(args)
    if args.dry_run:
        planned = plan_deploy(args.model, args.out, recipe, options, args.drop_stale_quantization)
        print_json(planned) if args.json else show_build_plan(planned)
        return 0
    with Progress() as progress:
        built = deploy(
            args.model, args.out, recipe, options, keep_checkpoint=args.keep_checkpoint, device=args.device,
            skip_transformers=args.skip_transformers, trust_remote_code=args.trust_remote_code,
            drop_stale=args.drop_stale_quantization,
            listener=progress.listener(), on_progress=progress.advance,
        )  # fmt: skip
    print_json(dict(built.manifest)) if args.json else show_built(args.out, built)
    return 0
