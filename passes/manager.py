"""How passes run: one program under one editor, each pass between what it requires and what it ensures.

    Work(program) --> requires, run, ensures of each pass in turn --> finish: a new, verified ExportedProgram

This is not torch.fx's PassManager, because that one knows GraphModules only (a pass here changes the signature, the state
dict and the sizes of an exported program, too), repeats its list until nothing changes, and turns whatever a pass raises
into a bare `Exception("An error occurred when running ...")`: a `UserError` has to reach the user as it is.

A pass keeps no state. Its settings are its fields; what it found goes into the `Work` as a fact, looked up by its type.
Every pass logs to `mla2dsa.passes.<name>`: what it did and could not do at INFO, its settings and details at DEBUG.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from torch.export import ExportedProgram
from torch.fx import GraphModule

from .graph.editor import ProgramEditor

Fact = TypeVar("Fact")


class BrokenPass(Exception):
    """A pass left the graph in a state that it promises not to leave: a mistake of the pass, not of its user."""

    def __init__(self, name: str, what: str, node: str | None = None) -> None:
        super().__init__(f"pass {name}: {what}" + (f" (node {node})" if node else ""))


class MissingFact(Exception):
    """A pass needs what an earlier one should have found: the passes are in the wrong order."""


@dataclass(frozen=True)
class Report:
    """What a pass did, in words for people. fact: its result in types, for later passes and for the caller.

    could_not: what it left as it was, each with the reason and the node. details: what only a debugging reader asks for.
    """

    did: tuple[str, ...]
    could_not: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    fact: object = None


@dataclass(frozen=True)
class Step:
    """One pass that ran: its name and report, the graph's size before and after, and how long it took."""

    name: str
    report: Report
    nodes_before: int
    nodes_after: int
    seconds: float


class Work:
    """What the passes hand on: the program under its editor, and the facts found so far."""

    def __init__(self, program: ExportedProgram) -> None:
        self.editor = ProgramEditor(program)
        self._facts: dict[type, object] = {}

    def restart(self, program: ExportedProgram) -> None:
        """Go on with another program. Whoever does has to find the facts that speak of nodes again."""
        self.editor = ProgramEditor(program)

    def add(self, fact: object) -> None:
        self._facts[type(fact)] = fact

    def fact(self, kind: type[Fact]) -> Fact:
        """Raises MissingFact when no pass has found it."""
        found = self._facts.get(kind)
        if not isinstance(found, kind):
            raise MissingFact(f"no {kind.__name__} was found yet: run the pass that finds it before")
        return found


class Pass(ABC):
    """One step over a program; a frozen dataclass whose fields are its settings."""

    name: ClassVar[str]

    @abstractmethod
    def requires(self, work: Work) -> None:
        """Raises UserError when the program is none that this pass takes; nothing is changed yet."""

    @abstractmethod
    def run(self, work: Work) -> Report:
        """Edit the program through `work.editor`, or only look at it."""

    @abstractmethod
    def ensures(self, work: Work) -> None:
        """Raises BrokenPass when the result is not what this pass promises. The graph has been linted, the fact is known."""


class Watcher(Protocol):
    """Whoever wants to see the graph before and after every pass."""

    def before(self, name: str, module: GraphModule) -> None: ...

    def after(self, step: Step, module: GraphModule) -> None: ...


_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher of passes", default=None)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Within the block `watcher` sees every pass of this thread, however deep the call that runs it."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


@dataclass(frozen=True)
class Run:
    """The result of `run_passes`: the new program, what each pass did, and the facts they found."""

    program: ExportedProgram
    steps: tuple[Step, ...]
    work: Work

    def fact(self, kind: type[Fact]) -> Fact:
        return self.work.fact(kind)


def run_passes(program: ExportedProgram, passes: Sequence[Pass]) -> Run:
    """`program` (left unchanged) after `passes`, verified by torch.export. Raises UserError when a pass does not take it."""
    work = Work(program)
    steps = apply_passes(work, passes)
    return Run(work.editor.finish(), steps, work)


def apply_passes(work: Work, passes: Sequence[Pass]) -> tuple[Step, ...]:
    """The same on a program that is being edited; whoever calls decides when to finish it."""
    return tuple(_apply(work, each) for each in passes)


def _apply(work: Work, each: Pass) -> Step:
    log = logging.getLogger(f"mla2dsa.passes.{each.name}")
    watcher = _WATCHER.get()
    nodes_before = len(work.editor.graph.nodes)
    if watcher is not None:
        watcher.before(each.name, work.editor.module)
    log.debug("%s on %d nodes", each, nodes_before)
    started = time.perf_counter()
    each.requires(work)
    report = each.run(work)
    if report.fact is not None:
        work.add(report.fact)
    _lint(work, each)
    each.ensures(work)
    step = Step(each.name, report, nodes_before, len(work.editor.graph.nodes), time.perf_counter() - started)
    _tell(log, step)
    if watcher is not None:
        watcher.after(step, work.editor.module)
    return step


def _lint(work: Work, each: Pass) -> None:
    try:
        work.editor.graph.lint()
    except (RuntimeError, ValueError) as error:  # its first line names the node, the others are the graph
        raise BrokenPass(each.name, f"the graph is not well formed: {str(error).splitlines()[0]}") from error


def _tell(log: logging.Logger, step: Step) -> None:
    for line in step.report.did:
        log.info("%s", line)
    for line in step.report.could_not:
        log.info("could not: %s", line)
    for line in step.report.details:
        log.debug("%s", line)
    log.info("%d nodes before, %d after, %.2f s", step.nodes_before, step.nodes_after, step.seconds)
