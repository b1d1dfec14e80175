"""export, inspect, env: what is done with a DSA checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import command_parser
from .parser import a_name, a_path


def add_use(commands: Any) -> None:
    """export, inspect, env."""
    _add_export(commands)
    _add_inspect(commands)
    _add_env(commands)


def _add_export(commands: Any) -> None:
    example = "mla2dsa export ./model-dsa ./model-onnx --max-seq 32768"
    command = command_parser(
        commands, "export", _export, "write a DSA checkpoint's graph with caches, as ONNX or .pt2", example, graphs=True
    )
    command.add_argument("model", metavar="CKPT", type=a_name, help="DSA checkpoint: folder or hub id")
    command.add_argument("out", metavar="OUT", type=a_path, help="folder to write")
    command.add_argument("--format", choices=("onnx", "pt2"), default="onnx", help="default onnx")
    command.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default float32"
    )
    command.add_argument("--max-batch", type=int, default=1, metavar="N", help="most sequences at once (default 1)")
    command.add_argument(
        "--max-seq", type=int, metavar="N", help="most tokens a cache holds (default: the model's context)"
    )
    command.add_argument(
        "--copy-weights", action="store_true", help="write all weights instead of linking the checkpoint's files"
    )
    command.add_argument("--overwrite", action="store_true", help="replace OUT")


def _export(args: argparse.Namespace) -> int:
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_export

    with Findings() as found:
        check_export(
            found,
            args.model,
            args.out,
            args.format,
            args.dtype,
            copy_weights=args.copy_weights,
            overwrite=args.overwrite,
        )

    from ..optimizer.export import export
    from .show.tables import print_json

    exported = export(
        args.model,
        args.out,
        args.format,
        args.dtype,
        args.max_batch,
        args.max_seq,
        args.copy_weights,
        overwrite=args.overwrite,
    )
    if args.json:
        print_json(dict(exported.manifest))
        return 0
    weights = exported.manifest["weights"]
    used, written = weights["zero_copy_bytes"] / 1e6, weights["written_bytes"] / 1e6
    print(
        f"{args.out}: {exported.manifest['file']}, {args.dtype}, {used:.1f} MB of weights used in place, {written:.1f} MB written"
    )
    return 0


def _add_inspect(commands: Any) -> None:
    about = "what a checkpoint, an exported folder or an .onnx file is: layers, ops, caches, bytes"
    command = command_parser(commands, "inspect", _inspect, about, "mla2dsa inspect ./model-dsa")
    command.add_argument(
        "target", metavar="TARGET", help="checkpoint (folder or hub id), exported folder, or .onnx file"
    )


def _inspect(args: argparse.Namespace) -> int:
    from ..files.model.model_files import is_folder

    if not Path(args.target).is_file():
        is_folder(args.target)  # or its error is raised, before torch is imported, which takes seconds

    from ..optimizer.inspect import inspect
    from .show.conversion import show_description
    from .show.tables import print_json

    found = inspect(args.target)
    print_json(found) if args.json else show_description(found)
    return 0


def _add_env(commands: Any) -> None:
    command_parser(commands, "env", _env, "versions, devices, and what is usable or why not", "mla2dsa env")


def _env(args: argparse.Namespace) -> int:
    from ..optimizer.environment import environment
    from .show.conversion import show_environment
    from .show.tables import print_json

    found = environment()
    print_json(found) if args.json else show_environment(found)
    return 0
