"""--dump-graphs: the graph before and after every pass of a command, as text files to read and to diff.

    001-normalize-before.txt   001-normalize-after.txt   002-find_mla-before.txt   ...

A file opens with the pass and the number of nodes, after it with what the pass did and could not do; then comes the graph as
Python, each value with its dtype and sizes. A command that runs several lists of passes goes on counting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.fx import GraphModule

from ..errors import UsageError, UserError
from ..files.staging import resolved
from ..files.writing import write_new
from ..passes.manager import Step, watched_by

FLAG = "--dump-graphs"


@contextmanager
def dump_graphs(folder: Path, outputs: Iterable[Path] = ()) -> Iterator[None]:
    """Within the block every pass leaves two files in `folder`. outputs: where the command writes its results.

    Raises UsageError when `folder` is in use or overlaps one of `outputs`, and at the end when no pass ran.
    """
    _check_new(folder)
    for out in outputs:
        if _overlap(resolved(folder), resolved(out)):
            raise UsageError(f"{FLAG} {folder}: overlaps the output {out}; choose a folder outside")
    writer = _Writer(folder)
    with watched_by(writer):
        yield
    if writer.count == 0:
        raise UsageError(
            f"{FLAG} {folder}: nothing was written, for no graph is made of what was given; all else is done"
        )


def _check_new(folder: Path) -> None:
    """Raises UsageError when `folder` is there and not an empty folder."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{FLAG} {folder}: is a file, expected a new or an empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{FLAG} {folder}: not empty, expected a new or an empty folder; choose another one")


def write_graph(file: Path, text: str) -> None:
    """Raises UserError when the file is there already, or the disk refuses. Its folder is made."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_new(file, text)
    except FileExistsError:
        raise UserError(f"{file}: is there already, and is not replaced; choose another folder") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


class _Writer:
    """Watches the passes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def before(self, name: str, module: GraphModule) -> None:
        self.count += 1
        self._write(name, "before", [f"{len(module.graph.nodes)} nodes"], module)

    def after(self, step: Step, module: GraphModule) -> None:
        report = step.report
        lines = [f"{step.nodes_after} nodes, {step.nodes_before} before", *report.did]
        lines += [f"could not: {line}" for line in report.could_not]
        self._write(step.name, "after", [*lines, *report.details], module)

    def _write(self, name: str, when: str, lines: list[str], module: GraphModule) -> None:
        head = "".join(f"# {line}\n" for line in [f"{when} {name}", *lines])
        code = module.print_readable(print_output=False)
        write_graph(self.folder / f"{self.count:03d}-{name}-{when}.txt", f"{head}\n{code.strip()}\n")
