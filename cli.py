"""The command line: one function per command. Results on stdout, progress and errors on stderr, exit codes 0, 1, 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .errors import UsageError, UserError

MODEL_HELP = "folder of a checkpoint, or a Hugging Face hub id"
EPILOG = """examples:
  mla2dsa plan deepseek-ai/DeepSeek-V3.1
  mla2dsa convert ./model ./model-dsa --calibration ./texts
  mla2dsa convert ./model ./model-dsa --indexer distil --calibration corpus.jsonl --tokens 262144
  mla2dsa verify ./model ./model-dsa --text held-out.txt
  mla2dsa strip ./model-dsa ./model-again

exit codes: 0 done, 1 failed (nothing matched, a check did not hold, bad files), 2 called in a way it does not take
MLA2DSA_DEBUG=1 shows a traceback with an error"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        args = _parser().parse_args(argv)
        result: int = args.run(args)
        sys.stdout.flush()
        return result
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail("interrupted; nothing was left half-written" + (f"; {error}" if error.args else ""), 1)
    except BrokenPipeError:
        _drop_broken_stdout()
        return 1
    except OSError as error:
        _drop_broken_stdout()
        return _fail(f"{error.filename or 'reading or printing'}: {error.strerror or error}", 1)
    except Exception as error:
        return _fail(_unexpected(error), 1)


def _drop_broken_stdout() -> None:
    """A closed pipe or a full disk behind stdout: without this Python would complain once more when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in first:
        return f"out of memory ({first}); use fewer --tokens, a shorter sequence_length, or smaller indexer sizes"
    return f"internal error: {type(error).__name__}: {first} (MLA2DSA_DEBUG=1 shows where; please report it)"


def _fail(message: str, code: int) -> int:
    if os.environ.get("MLA2DSA_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    print("mla2dsa: " + " ".join(message.split()), file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints in one line like every other."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mla2dsa", description="Turn a dense MLA checkpoint into a DeepSeek Sparse Attention checkpoint, and prove it.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"mla2dsa {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_convert(commands)
    _add_verify(commands)
    _add_strip(commands)
    _add_export(commands)
    _add_generate(commands)
    _add_inspect(commands)
    _add_env(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, example: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return command


def _add_recipe(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("indexer")
    group.add_argument(
        "--recipe", metavar="FILE", help="YAML file with any of these settings and more (docs/recipe.md)"
    )
    group.add_argument("--indexer", metavar="SOURCE", help="closed-form (default), distil, or donor:PATH")
    group.add_argument("--index-topk", type=int, metavar="K", help="past tokens each query attends to (default 2048)")
    group.add_argument(
        "--index-n-heads", type=int, metavar="H", help="index heads (default: the model's heads, at most 64)"
    )
    group.add_argument("--index-head-dim", type=int, metavar="D", help="width of an index head (default 128)")


def _recipe(args: argparse.Namespace) -> Any:
    from .optimizer.recipe import read_recipe

    fields = ("indexer", "index_topk", "index_n_heads", "index_head_dim", "calibration", "tokens")
    return read_recipe(args.recipe, {name: getattr(args, name, None) for name in fields})


def _add_plan(commands: Any) -> None:
    command = _command(
        commands, "plan", _plan, "show what a conversion would do, and why not; reads no weight", "mla2dsa plan ./model"
    )
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument(
        "--allow-partial", action="store_true", help="plan a model that has other attention beside MLA"
    )
    _add_recipe(command)


def _plan(args: argparse.Namespace) -> int:
    from .optimizer.plan import prepare
    from .optimizer.show import print_json, show_plan

    plan = prepare(args.model, _recipe(args), args.allow_partial).plan
    print_json(plan.to_json()) if args.json else show_plan(plan)
    return 0


def _add_convert(commands: Any) -> None:
    example = "mla2dsa convert ./model ./model-dsa --indexer distil --calibration ./texts"
    command = _command(
        commands, "convert", _convert, "write the DSA checkpoint of a dense MLA checkpoint, verified", example
    )
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    _add_recipe(command)
    command.add_argument(
        "--calibration", metavar="PATH", help="text file, folder of text, or .jsonl (default: random tokens)"
    )
    command.add_argument(
        "--tokens", type=int, metavar="N", help="how much of it to use (default 16 sequences; 64 for distil)"
    )
    command.add_argument("--device", default="cpu", help="where the model is streamed through (default cpu)")
    existing = command.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with an unfinished conversion")
    existing.add_argument("--overwrite", action="store_true", help="replace OUT, or an unfinished conversion")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    command.add_argument("--skip-verification", action="store_true", help="write the result without proving it")
    command.add_argument(
        "--skip-transformers", action="store_true", help="verify on the streamed graph only (large models)"
    )


def _convert(args: argparse.Namespace) -> int:
    from .optimizer.convert import convert, dry_run
    from .optimizer.show import Progress, print_json, show_layers, show_plan, show_verification

    recipe = _recipe(args)
    if args.dry_run:
        plan = dry_run(args.model, args.out, recipe, resume=args.resume, overwrite=args.overwrite)
        print_json(plan.to_json()) if args.json else show_plan(plan)
        return 0
    with Progress() as progress:
        outcome = convert(
            args.model, args.out, recipe, resume=args.resume, overwrite=args.overwrite, device=args.device,
            skip_verification=args.skip_verification, skip_transformers=args.skip_transformers, listener=progress.listener(),
        )  # fmt: skip
    if args.json:
        print_json(outcome.report)
        return 0
    show_plan(outcome.plan)
    show_layers(outcome.layers, outcome.report)
    if outcome.verification is not None:
        show_verification(outcome.verification, layers=False)
    print(
        f"{args.out}: written in {outcome.report['seconds']:.0f} s" + ("" if outcome.verification else ", NOT verified")
    )
    return 0


def _add_verify(commands: Any) -> None:
    example = "mla2dsa verify ./model ./model-dsa --text held-out.txt"
    command = _command(
        commands, "verify", _verify, "hold a DSA checkpoint against the dense one it was made from", example
    )
    command.add_argument("dense", metavar="DENSE", type=Path, help="folder of the dense checkpoint")
    command.add_argument("dsa", metavar="DSA", type=Path, help="folder of the DSA checkpoint")
    command.add_argument(
        "--text", metavar="PATH", help="held-out text: file, folder or .jsonl (default: random tokens)"
    )
    command.add_argument("--sequences", type=int, default=8, metavar="N", help="sequences to look at (default 8)")
    command.add_argument(
        "--sequence-length", type=int, metavar="L", help="tokens of a sequence (default 4 * index_topk, at least 1024)"
    )
    command.add_argument(
        "--max-loss-delta", type=float, default=None, metavar="X", help="most loss increase, nats/token (default 0.05)"
    )
    command.add_argument("--device", default="cpu", help="where the models are streamed through (default cpu)")
    command.add_argument(
        "--skip-transformers", action="store_true", help="do not load the checkpoints with transformers (large models)"
    )


def _verify(args: argparse.Namespace) -> int:
    from .optimizer.show import Progress, print_json, show_verification
    from .optimizer.verify import verify_folders

    with Progress() as progress:
        result = verify_folders(
            args.dense, args.dsa, args.text, sequences=args.sequences, sequence_length=args.sequence_length,
            max_loss_delta=args.max_loss_delta, skip_transformers=args.skip_transformers, device=args.device,
            on_progress=progress.advance,
        )  # fmt: skip
    print_json(result.to_json()) if args.json else show_verification(result)
    if not result.passed:
        raise UserError(result.failure())
    return 0


def _add_strip(commands: Any) -> None:
    command = _command(
        commands, "strip", _strip, "give the dense checkpoint back, bit for bit", "mla2dsa strip ./model-dsa ./model"
    )
    command.add_argument("dsa", metavar="DSA", type=Path, help="folder that mla2dsa convert wrote")
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    command.add_argument("--overwrite", action="store_true", help="replace OUT")


def _strip(args: argparse.Namespace) -> int:
    from .exporters.dsa_checkpoint import strip
    from .optimizer.show import print_json

    if not args.dsa.is_dir():
        raise UserError(f"{args.dsa}: no such folder")
    out = strip(args.dsa, args.out, overwrite=args.overwrite)
    print_json({"out": str(out)}) if args.json else print(f"{out}: the dense checkpoint again, bit for bit")
    return 0


def _add_export(commands: Any) -> None:
    example = "mla2dsa export ./model-dsa ./model-onnx --max-seq 32768"
    command = _command(
        commands, "export", _export, "write a DSA checkpoint's graph with caches, as ONNX or .pt2", example
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
    from .optimizer.export import export
    from .optimizer.show import print_json

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
    command = _command(commands, "generate", _generate, "continue a prompt; the text alone goes to stdout", example)
    command.add_argument("model", metavar="MODEL", help="DSA checkpoint (folder or hub id), or an exported folder")
    command.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads stdin")
    command.add_argument(
        "--runtime", choices=("torch", "onnxruntime"), help="default: onnxruntime for an ONNX export, else torch"
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


def _generate(args: argparse.Namespace) -> int:
    from .exporters.generation import Sampling
    from .optimizer.generate import generate_text
    from .optimizer.show import print_json

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    pieces = generate_text(args.model, prompt, args.runtime, args.max_new_tokens, sampling, args.device)
    if args.json:
        print_json({"text": "".join(pieces)})
        return 0
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _add_inspect(commands: Any) -> None:
    about = "what a checkpoint, an exported folder or an .onnx file is: layers, ops, caches, bytes"
    command = _command(commands, "inspect", _inspect, about, "mla2dsa inspect ./model-dsa")
    command.add_argument(
        "target", metavar="TARGET", help="checkpoint (folder or hub id), exported folder, or .onnx file"
    )


def _inspect(args: argparse.Namespace) -> int:
    from .optimizer.inspect import inspect
    from .optimizer.show import print_json, show_description

    found = inspect(args.target)
    print_json(found) if args.json else show_description(found)
    return 0


def _add_env(commands: Any) -> None:
    _command(commands, "env", _env, "versions, devices, and what is usable or why not", "mla2dsa env")


def _env(args: argparse.Namespace) -> int:
    from .optimizer.environment import environment
    from .optimizer.show import print_json, show_environment

    found = environment()
    print_json(found) if args.json else show_environment(found)
    return 0
