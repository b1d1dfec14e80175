"""export, generate, inspect, env: what is done with a DSA checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import add_trust, command_parser


def add_use(commands: Any) -> None:
    """export, generate, inspect, env."""
    _add_export(commands)
    _add_generate(commands)
    _add_inspect(commands)
    _add_env(commands)


def _add_export(commands: Any) -> None:
    example = "mla2dsa export ./model-dsa ./model-onnx --max-seq 32768"
    command = command_parser(
        commands, "export", _export, "write a DSA checkpoint's graph with caches, as ONNX or .pt2", example, graphs=True
    )
    command.add_argument("model", metavar="CKPT", help="DSA checkpoint: folder or hub id")
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write")
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


def _add_generate(commands: Any) -> None:
    example = 'mla2dsa generate ./model-dsa "def main():" --max-new-tokens 64'
    command = command_parser(
        commands, "generate", _generate, "continue a prompt; the text alone goes to stdout", example, graphs=True
    )
    command.add_argument(
        "model", metavar="MODEL", help="checkpoint, DSA or dense (folder or hub id), exported folder, or engine folder"
    )
    command.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads stdin")
    command.add_argument(
        "--runtime",
        choices=("torch", "onnxruntime", "tensorrt"),
        help="default: onnxruntime for an ONNX export, tensorrt for an engine, else torch",
    )
    command.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="most tokens to write (default 128)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the most likely token"
    )
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the most likely tokens of this mass"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    command.add_argument("--device", default="cpu", help="where torch runs (default cpu)")
    add_trust(command)


def _generate(args: argparse.Namespace) -> int:
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_generate

    with Findings() as found:
        check_generate(found, args.model, args.runtime)

    from ..optimizer.generate import generate_text
    from ..runtime.generation import Sampling
    from .show.tables import print_json

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    pieces = generate_text(
        args.model, prompt, args.runtime, args.max_new_tokens, sampling, args.device, args.trust_remote_code
    )
    if args.json:
        print_json({"text": "".join(pieces)})
        return 0
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _add_inspect(commands: Any) -> None:
    about = "what a checkpoint, an exported folder or an .onnx file is: layers, ops, caches, bytes"
    command = command_parser(commands, "inspect", _inspect, about, "mla2dsa inspect ./model-dsa")
    command.add_argument(
        "target", metavar="TARGET", help="checkpoint (folder or hub id), exported folder, or .onnx file"
    )


def _inspect(args: argparse.Namespace) -> int:
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
