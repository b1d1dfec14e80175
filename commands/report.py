"""report: what a verification found, what two models said, or how fast models are, as a page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError, UserError
from .common import command_parser
from .parser import a_path


def add_report(commands: Any) -> None:
    """report."""
    command = command_parser(
        commands, "report", _report, "what was measured, as one HTML page with plots", "mla2dsa report ./model-dsa report.html"
    )  # fmt: skip
    command.add_argument(
        "source",
        metavar="SOURCE",
        type=a_path,
        help="folder that convert wrote, or a file that `verify --json`, `compare --json` or `bench --json` printed",
    )
    command.add_argument("out", metavar="OUT", type=a_path, help="file to write, which is not there yet")
    command.add_argument(
        "--bench",
        metavar="FILE",
        type=a_path,
        help="what `bench --json` printed of the dense model and the converted one: measured beside counted cost",
    )


def _report(args: argparse.Namespace) -> int:
    from ..exporters.dsa.names import REPORT
    from ..files.json_files import read_json
    from .show.tables import print_json

    source, out = Path(args.source), Path(args.out)
    check_page(out)
    file = source / REPORT if source.is_dir() else source
    report = read_json(file)
    if report.get("verification", report) is None:
        raise UserError(
            f"{file}: the conversion was not verified (--skip-verification); run `mla2dsa verify --json` and give its output"
        )
    if args.bench and not report.keys().isdisjoint(("prompts", "results")):
        raise UsageError(f"--bench: is drawn beside a verification; {file} has none")
    _write(_page(report, file, source, args.bench), out)
    print_json({"out": str(out)}) if args.json else print(f"{out}: written")
    return 0


def check_page(out: Path) -> None:
    """Raises UsageError or UserError where no page can be written to `out`."""
    from ..files.temporary import nameless_file

    _check_new(out)
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder")
    try:
        nameless_file(out.parent).close()
    except OSError as error:
        raise UserError(
            f"{out.parent}: cannot be written to ({error.strerror}); give another place for {out.name}"
        ) from None


def write_page(verification: dict[str, Any], out: Path, dsa: Path) -> None:
    """The page of what `verify --json` would print of the folder `dsa`."""
    from ..exporters.report.page import page, page_title
    from ..files.finite import finite

    _write(page(finite(verification), page_title(dsa)), out)


def _write(made: str, out: Path) -> None:
    from ..files.temporary import replace_file

    _check_new(out)  # drawing took seconds
    replace_file(out, made.encode())  # whole or not at all


def _page(report: dict[str, Any], file: Path, source: Path, bench: Path | None) -> str:
    """Raises UserError for what is no report, and where there is nothing to draw with."""
    from ..exporters.report.benched import benched_page, measured_cost
    from ..exporters.report.compared import compared_page
    from ..exporters.report.page import page, page_title
    from ..exporters.report.plots import check_library
    from ..files.json_files import read_json

    fault = f"{file}: neither a report.json nor what `verify --json`, `compare --json` or `bench --json` prints"
    if "prompts" in report:
        return _drawn(fault, compared_page, report, page_title(source))  # texts side by side have no plots
    check_library()
    if "results" in report:
        return _drawn(fault, benched_page, report, page_title(source, "how fast"))
    measured = _drawn(f"{bench}: not what `bench --json` prints", measured_cost, read_json(bench)) if bench else ""
    return _drawn(fault, page, report, page_title(source), measured)


def _drawn(fault: str, make: Callable[..., str], *of: Any) -> str:
    """Raises UserError, with `fault` for what is wrong, where `make` cannot read what a file has in it."""
    try:
        return make(*of)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise UserError(f"{fault} ({type(error).__name__}: {error})") from None


def _check_new(out: Path) -> None:
    """Raises UsageError."""
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: is there already; give a new name")
