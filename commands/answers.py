"""generate, serve: what asks a model, dense or sparse, in any runtime."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError, short
from ..files.dtypes import MODEL_DTYPES
from .common import add_trust, command_parser
from .parser import a_name, a_path

RUNTIMES = ("torch", "onnxruntime", "tensorrt")
MODEL = "checkpoint, DSA or dense (folder or hub id), exported folder, or engine folder"


def add_answers(commands: Any) -> None:
    """generate, serve."""
    _add_generate(commands)
    _add_serve(commands)


def _add_generate(commands: Any) -> None:
    example = 'mla2dsa generate ./model-dsa "def main():" --max-new-tokens 64\n  mla2dsa generate ./model "What is MLA?" --chat'
    about = "continue prompts, or answer them with --chat; the text alone goes to stdout"
    command = command_parser(commands, "generate", _generate, about, example, graphs=True, intermixed=True)
    command.add_argument("model", metavar="MODEL", type=a_name, help=MODEL)
    add_prompts(command, "--prompt-file")
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    command.add_argument("--runtime", choices=RUNTIMES, help="default: that of the folder, torch for a checkpoint")
    command.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="most tokens to write (default 128)"
    )
    _add_sampling(command)
    command.add_argument("--device", default="cpu", help="where torch runs (default cpu)")
    add_dtype(command)
    add_trust(command)


def add_dtype(command: argparse.ArgumentParser) -> None:
    """Of commands that run models."""
    command.add_argument(
        "--dtype", choices=MODEL_DTYPES,
        help="of checkpoints' weights and caches; bfloat16 takes half the memory of float32 (default float32)",
    )  # fmt: skip


def add_prompts(command: argparse.ArgumentParser, file: str) -> None:
    """file: the option that names a file of them."""
    command.add_argument(
        "prompts",
        metavar="PROMPT",
        nargs="*",
        help="the text to continue; - reads stdin; several come one after another",
    )
    command.add_argument(
        file, dest="prompt_file", type=a_path, metavar="FILE",
        help='a file that is a prompt, or .jsonl with one a line: {"prompt": "..."} or a string',
    )  # fmt: skip
    command.add_argument("--chat", action="store_true", help="prompts are questions in the model's chat template")
    command.add_argument("--system", metavar="TEXT", help="what is said to the model before a question; with --chat")


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--temperature", type=float, metavar="T",
        help="0 takes the most likely token; default: all sampling as generation_config.json says",
    )  # fmt: skip
    command.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens of this mass")
    command.add_argument("--top-k", type=int, metavar="K", help="sample from so many tokens (0: all)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")


def _generate(args: argparse.Namespace) -> int:
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_generate

    _check(args)
    with Findings() as found:
        check_generate(found, [args.model], args.runtime, args.dtype)

    from ..optimizer.answers.answer import Piece, answer
    from ..optimizer.answers.opened import open_model
    from ..optimizer.generate import ask_of, check_count
    from .show.answers import heading
    from .show.tables import print_json

    check_count(args.max_new_tokens)
    prompts = prompts_of(args)
    opened = open_model(args.model, args.runtime, args.device, args.trust_remote_code, dtype=args.dtype)
    sampling = _sampling(args, opened.folder)
    answers: list[dict[str, Any]] = []
    for prompt in prompts:
        ask = ask_of(
            opened, prompt, args.max_new_tokens, sampling, tuple(args.stop), chat=args.chat, system=args.system
        )
        pieces: list[Piece] = []
        if len(prompts) > 1 and not args.json:
            print(f"==> {heading(prompt)} <==")
        for piece in answer(opened, ask):
            pieces.append(piece)
            print("" if args.json else piece.text, end="", flush=True)
        print("" if args.json else "\n", end="")
        answers.append(_told(prompt, len(ask.ids), pieces))
    if args.json:
        print_json({**({"text": answers[0]["text"]} if len(answers) == 1 else {}), "answers": answers})
    return 0


def _add_serve(commands: Any) -> None:
    example = "mla2dsa serve ./model ./model-dsa --port 8000"
    about = "answer OpenAI's API with several models, to compare them; a page for it is at /"
    command = command_parser(commands, "serve", _serve, about, example, graphs=True)
    command.add_argument(
        "models", metavar="MODEL", type=a_name, nargs="+", help=f"{MODEL}; its id is the folder's name"
    )
    command.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    command.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0 takes any that is free")
    command.add_argument(
        "--api-key", metavar="KEY", help="what clients have to send; default: $MLA2DSA_API_KEY, without it nothing"
    )
    limits = (
        ("--max-tokens", 1024, "most tokens of an answer"),
        ("--max-body", 2**20, "most bytes of a request"),
        ("--queue", 64, "requests that may wait for a model; more are told 429"),
    )
    for name, default, about in limits:
        command.add_argument(name, type=int, default=default, metavar="N", help=f"{about} (default {default})")
    command.add_argument(
        "--max-seq", type=int, metavar="N", help="most tokens of prompt and answer (default: the model's context)"
    )
    command.add_argument(
        "--temperature", type=float, metavar="T",
        help="of requests that do not say; default: all sampling as generation_config.json says",
    )  # fmt: skip
    command.add_argument("--runtime", choices=RUNTIMES, help="default: that of each folder, torch for a checkpoint")
    command.add_argument("--device", default="cpu", help="where torch runs (default cpu)")
    add_dtype(command)
    add_trust(command)


def _serve(args: argparse.Namespace) -> int:
    _check_sampling(args)
    from ..runtime.generation import Sampling
    from ..serving.server import check_installed, serve
    from ..serving.settings import Settings

    settings = Settings(
        tuple(args.models), args.host, args.port, args.api_key or os.environ.get("MLA2DSA_API_KEY"), args.max_body,
        args.max_tokens, args.max_seq, args.queue, None if args.temperature is None else Sampling(args.temperature),
        args.runtime, args.device, args.trust_remote_code, args.dtype,
    )  # fmt: skip
    check_installed()
    _check_models(args)
    if not settings.is_local and settings.api_key is None:
        print(f"note: whoever reaches {args.host} may ask; --api-key KEY keeps others out", file=sys.stderr)
    serve(settings)
    return 0


def _check_models(args: argparse.Namespace) -> None:
    """What is wrong with any of them, before the first is opened."""
    from ..optimizer.before.findings import Findings
    from ..optimizer.before.preflight import check_generate

    with Findings() as found:
        check_generate(found, args.models, args.runtime, args.dtype)


_SAMPLING: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda it: 0 <= it < math.inf, "0 (greedy) or more"),
    "top_p": (lambda it: 0 < it <= 1, "more than 0 and at most 1"),
    "top_k": (lambda it: it >= 0, "0 (all tokens) or more"),
    "seed": (lambda it: -(2**63) <= it < 2**63, "a number of 64 bits"),
}


def _check_sampling(args: argparse.Namespace) -> None:
    """What `Sampling` would refuse, said of the options, before a model is opened. Raises UsageError."""
    for name, (is_right, expected) in _SAMPLING.items():
        value = getattr(args, name, None)
        if value is not None and not is_right(value):
            raise UsageError(f"--{name.replace('_', '-')} {short(value)}, expected {expected}")


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    check_prompts(args)
    _check_sampling(args)
    if args.temperature is None and not (args.top_p is None and args.top_k is None):
        raise UsageError(
            "--top-p and --top-k go with --temperature: pass it, too (1 leaves the likelihoods as they are)"
        )
    if "" in args.stop:
        raise UsageError("--stop is empty, expected a text")


def check_prompts(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    if not args.prompts and args.prompt_file is None:
        raise UsageError("no prompt: give one, - for stdin, or a file of them (--help says how)")
    if args.system is not None and not args.chat:
        raise UsageError("--system is said in a conversation: pass --chat, too")
    if args.prompts.count("-") > 1:
        raise UsageError("- reads stdin, which has one text: give it once")


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Those of the command line, then those of the file."""
    from ..optimizer.answers.prompts import read_prompts

    given = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompts]
    return [*given, *(read_prompts(args.prompt_file) if args.prompt_file is not None else [])]


def _sampling(args: argparse.Namespace, folder: Path) -> Any:
    from ..optimizer.answers.defaults import default_sampling
    from ..runtime.generation import Sampling

    if args.temperature is None:
        return default_sampling(folder, args.seed)
    top_p = 1.0 if args.top_p is None else args.top_p
    return Sampling(args.temperature, top_p, args.seed, args.top_k or 0)


def _told(prompt: str, tokens: int, pieces: list[Any]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": "".join(piece.text for piece in pieces),
        "finish_reason": pieces[-1].finish,
        "prompt_tokens": tokens,
        "completion_tokens": sum(piece.token is not None for piece in pieces),
    }
