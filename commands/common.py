"""What every command's parser is made with."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..runtime.processes import join_processes, processes, several
from .parser import Parser, a_path
from .show.quiet import QUIET

MODEL_HELP = "folder of a checkpoint, or a Hugging Face hub id"


def architectures(text: str) -> tuple[int, ...]:
    """The value of --sm: 80,90 or sm_80,sm_90. Raises UsageError."""
    try:
        return tuple(int(part.strip().removeprefix("sm_")) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--sm {text}: expected numbers with commas between, as 80,90") from None


def command_parser(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    about: str,
    example: str,
    *,
    graphs: bool = False,
    intermixed: bool = False,
    together: bool = False,
) -> argparse.ArgumentParser:
    """A command that calls `run` with its arguments, and takes --json, -v, -q and --log-file. about: a phrase, without a full stop.

    graphs: passes run over a model's graph in it, so it takes --dump-graphs, too. intermixed: see `Parser`. together: processes of
    torchrun share its work.
    """
    command: Parser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.set_defaults(run=run, together=together, parser=command)
    command.intermixed = intermixed
    command.add_argument("--json", action="store_true", help="print one JSON object instead of tables; errors, too")
    _add_logging(command)
    if graphs:
        command.add_argument(
            "--dump-graphs", metavar="DIR", type=a_path,
            help="write the graph before and after each pass to DIR, a new or empty folder",
        )  # fmt: skip
    return command


def _add_logging(command: argparse.ArgumentParser) -> None:
    """What is told while a command runs."""
    loud = command.add_mutually_exclusive_group()
    loud.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr: errors alone")
    loud.add_argument(
        "-v", "--verbose", action="count", default=0,
        help="log to stderr what each graph pass did and could not do; -vv with every detail",
    )  # fmt: skip
    command.add_argument(
        "--log-file",
        metavar="FILE",
        type=a_path,
        help="write what -vv logs to FILE, a new file, with the time of each line",
    )


def add_trust(command: argparse.ArgumentParser) -> None:
    """Of commands that load a tokenizer."""
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the tokenizer's own Python code, if it has any (read it first)",
    )


def add_drop_stale(command: argparse.ArgumentParser) -> None:
    """Of commands that read a dense checkpoint."""
    command.add_argument(
        "--drop-stale-quantization", action="store_true",
        help="where config.json has a quantization_config and no tensor is quantised: leave it out instead of refusing",
    )  # fmt: skip


def under_torchrun() -> bool:
    """Whether there are several processes, which torchrun started."""
    return several()


@contextmanager
def joined() -> Iterator[None]:
    """Together with the other processes of torchrun, if there are any; all of them come out of it when all are through."""
    join_processes()
    yield
    processes().end()


def agreed(lines: Sequence[str], code: int) -> tuple[Sequence[str], int]:
    """(lines to tell, exit code) of a process that fails with these: one of several tells for all of them."""
    return processes().agreed(lines, code)


def left_with(code: int) -> int:
    """`code`. One of several processes that fails is gone at once: a thread of it may wait for others, and torchrun would kill
    whoever takes longer to go, so that codes would differ."""
    if code and under_torchrun():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def run_command(args: argparse.Namespace) -> int:
    """The command that was asked for, with its log on stderr and its graphs in --dump-graphs; returns the exit code."""
    if under_torchrun() and not getattr(args, "together", False):
        raise UsageError(
            "torchrun: the work of `convert` alone is shared among processes; start this command without it"
        )
    if not processes().first:
        return int(args.run(args))
    with _logged(args.verbose, args.log_file), _graphs_dumped(args), _quiet(args.quiet):
        return int(args.run(args))


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    before = QUIET.set(quiet)
    try:
        yield
    finally:
        QUIET.reset(before)


@contextmanager
def _graphs_dumped(args: argparse.Namespace) -> Iterator[None]:
    folder = getattr(args, "dump_graphs", None)
    if folder is None:
        yield
        return
    from ..optimizer.graph_dumps import dump_graphs

    outputs = (getattr(args, name, None) for name in ("out", "keep_checkpoint"))
    with dump_graphs(folder, [out for out in outputs if out is not None]):
        yield


@contextmanager
def _logged(verbose: int, file: Path | None) -> Iterator[None]:
    """Our loggers, and nobody else's, on stderr: INFO once asked for, DEBUG twice; all of it in `file`. Else nothing is logged."""
    if not verbose and file is None:
        yield
        return
    logger = logging.getLogger("mla2dsa")
    level, propagate = logger.level, logger.propagate
    with ExitStack() as closing:
        handlers = [_on_stderr(verbose)] if verbose else []
        handlers += [closing.enter_context(_in_file(file))] if file is not None else []
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(min(handler.level for handler in handlers))
        logger.propagate = False  # a library that gives the root logger a handler would print every line again
        try:
            yield
        finally:
            for handler in handlers:
                logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _on_stderr(verbose: int) -> logging.Handler:
    handler = _Stderr(logging.DEBUG if verbose > 1 else logging.INFO)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    return handler


@contextmanager
def _in_file(file: Path) -> Iterator[logging.Handler]:
    from ..files.writing import create

    try:
        stream = io.TextIOWrapper(create(file), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    except FileExistsError:
        raise UsageError(f"--log-file {file}: is there already; name a new file") from None
    except OSError as error:
        raise UsageError(f"--log-file {file}: {error.strerror or error}") from None
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    with stream:
        yield handler


class _Stderr(logging.Handler):
    """Whatever sys.stderr is when a line comes: progress bars stand in for it while they are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)
