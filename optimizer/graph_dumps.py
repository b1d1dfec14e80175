"""--dump-graphs: the graph before and after every pass of a command, as text files to read and to diff.

    001-normalize-before.txt   001-normalize-after.txt   002-find_mla-before.txt   ...

A file opens with the pass and the number of nodes, after it with what the pass did and could not do; then comes the graph as
Python, each value with its dtype and sizes. A command that runs several lists of passes goes on counting.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.fx import GraphModule

from ..errors import UsageError
from ..files.new_files import check_new_folder, write_new
from ..passes.manager import Step, watched_by

FLAG = "--dump-graphs"


@contextmanager
def dump_graphs(folder: Path, out: Path | None = None) -> Iterator[None]:
    """Within the block every pass leaves two files in `folder`. out: where the command writes its result.

    Raises UsageError when `folder` is in use or overlaps `out`, and at the end when no pass ran.
    """
    check_new_folder(folder, FLAG)
    if out is not None and _overlap(folder.resolve(), out.resolve()):
        raise UsageError(f"{FLAG} {folder}: overlaps the output {out}; choose a folder outside")
    writer = _Writer(folder)
    with watched_by(writer):
        yield
    if writer.count == 0:
        raise UsageError(
            f"{FLAG} {folder}: nothing was written, for no graph is made of what was given; all else is done"
        )


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
        write_new(self.folder / f"{self.count:03d}-{name}-{when}.txt", f"{head}\n{code.strip()}\n")
