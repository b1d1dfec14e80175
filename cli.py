"""The command line: runs one of the `commands` and says in one line what went wrong.

Results on stdout, progress and errors on stderr, exit codes 0, 1, 2.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from . import __version__
from .commands.answers import add_answers
from .commands.bench import add_bench
from .commands.common import agreed, joined, left_with, run_command, under_torchrun
from .commands.comparing import add_compare
from .commands.completion import add_completion
from .commands.conversion import add_conversion
from .commands.engines import add_engines
from .commands.kernels import add_kernels
from .commands.parser import Parser
from .commands.recipe import add_recipes
from .commands.report import add_report
from .commands.use import add_use
from .commands.verification import add_verify
from .errors import SeveralErrors, UserError, short
from .stopping import Stop, stoppable

_LONGEST_WORD, _LONGEST_LINE = 240, 1000  # of an error line: a path
_INTERRUPTED = "interrupted; nothing was left half-written"

EPILOG = """examples:
  mla2dsa plan deepseek-ai/DeepSeek-V3.1
  mla2dsa recipe init ./model -o recipe.yaml
  mla2dsa convert ./model ./model-dsa --calibration ./texts
  mla2dsa convert ./model ./model-dsa --indexer distil --calibration corpus.jsonl --tokens 262144
  mla2dsa verify ./model ./model-dsa --text held-out.txt
  mla2dsa strip ./model-dsa ./model-again
  mla2dsa generate ./model-dsa "What is MLA?" --chat
  mla2dsa compare ./model ./model-dsa "def main():"
  mla2dsa serve ./model ./model-dsa --port 8000
  mla2dsa build ./model-dsa ./engine --max batch=4,cache_length=65536
  mla2dsa deploy ./model ./engine --calibration ./texts --sm 90
  mla2dsa kernels build --sm 80,90 --out ./kernels

exit codes: 0 done, 1 failed (nothing matched, a check did not hold, bad files), 2 called in a way it does not take,
130 interrupted (Ctrl-C), 143 and 129 the same by SIGTERM and by a closed terminal; nothing is left half-written by any
MLA2DSA_DEBUG=1 shows a traceback with an error; with --json an error is one JSON object on stderr; NO_COLOR is heard"""


def program() -> int:
    """What the shell starts: `main`, after which the process ends."""
    code = _main(sys.argv[1:], for_good=True)
    gc.freeze()  # an ending Python looks through every object for cycles: 1.5 s after a plan of DeepSeek-V3
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return _main(sys.argv[1:] if argv is None else argv, for_good=False)


def _main(argv: Sequence[str], for_good: bool) -> int:
    # torchrun sends on what has come to all of its processes already: a second signal is no wish to end at once
    with stoppable(once=under_torchrun(), for_good=for_good) as stop:
        try:
            return left_with(_run(argv, stop))
        except KeyboardInterrupt:  # between the end of the work and `stop.over`
            stop.over()
            return left_with(_fail([_INTERRUPTED], 128 + stop.number, "--json" in argv))


def _run(argv: Sequence[str], stop: Stop) -> int:
    def tell(lines: Sequence[str], code: int) -> int:
        stop.over()
        return _fail(lines, code, as_json="--json" in argv)

    try:
        _open_streams()
        with joined():
            result = run_command(_arguments(argv))
            sys.stdout.flush()
        stop.over()
        return result
    except SeveralErrors as error:
        return tell(error.lines, error.exit_code)
    except UserError as error:
        return tell([str(error)], error.exit_code)
    except KeyboardInterrupt as error:
        said = f"; {error}" if error.args else ""
        return tell([_INTERRUPTED + said], 128 + stop.number)
    except BrokenPipeError:
        _drop_broken_stdout()
        return tell([], 1)
    except OSError as error:
        _drop_broken_stdout()
        return tell([f"{error.filename or 'reading or printing'}: {error.strerror or error}"], 1)
    except Exception as error:
        if stop.asked_for:  # what a library made of it, as the SystemError of C code that has lost the exception
            return tell([f"interrupted; then {_unexpected(error)}"], 128 + stop.number)
        return tell([_unexpected(error)], 1)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Raises UsageError, which names the --help of the command that was called."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.refuse(unknown)
    args.parser_of_all = parser
    return args


def _open_streams() -> None:
    """Without this, a file that is opened later would get the number of a closed stream, and what libraries print would go
    into it. Raises UserError where there is nowhere to print results to."""
    closed = sys.stdout is None
    if closed or sys.stderr is None or sys.stdin is None:
        while os.open(os.devnull, os.O_RDWR) <= 2:  # the lowest number that is free
            pass
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    if closed:
        raise UserError("stdout is closed, and results are printed there; send it to a file or to /dev/null")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be no text, a locale may know ASCII only


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


def _fail(lines: Sequence[str], code: int, as_json: bool) -> int:
    """One line on stderr for each of `lines`; as_json: one line that is a JSON object, for all."""
    if os.environ.get("MLA2DSA_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    lines, code = agreed([_plain_line(line) for line in lines], code)
    if lines:
        said = "\n  ".join([f"mla2dsa: {lines[0]}", *lines[1:]])
        if as_json:
            said = json.dumps({"error": lines[0], "details": [line.strip() for line in lines[1:]], "exit_code": code})
        with suppress(OSError):  # a full disk behind stderr: the exit code is all that can be told
            print(said, file=sys.stderr)
    return code


def _plain_line(text: str) -> str:
    """One line that a terminal can show, whatever a path or a library's message holds."""
    return short(" ".join(short(word, _LONGEST_WORD) for word in text.split()), _LONGEST_LINE)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mla2dsa", description="Turn a dense MLA checkpoint into a DeepSeek Sparse Attention checkpoint, and prove it.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"mla2dsa {__version__}")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_conversion(commands)
    add_verify(commands)
    add_recipes(commands)
    add_use(commands)
    add_answers(commands)
    add_compare(commands)
    add_report(commands)
    add_engines(commands)
    add_bench(commands)
    add_kernels(commands)
    add_completion(commands)
    return parser
