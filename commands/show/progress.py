"""Bars on a terminal, for work that takes a while."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from .quiet import QUIET

_STAGES = {
    "calibrate": "calibrating",
    "share": "choosing layers that share",
    "exactness": "checking exactness",
    "transformers": "comparing with transformers",
    "text": "measuring on text",
    "long": "asking in long texts",
    "foreign text": "measuring on foreign text",
    "bench": "timing",
}


class Bars:
    """Bars on a terminal and nothing elsewhere; always on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True, highlight=False, quiet=QUIET.get())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(
            *columns, console=console, disable=console.quiet or not console.is_terminal, transient=True
        )
        self._console = console
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def advance(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(_STAGES.get(stage, stage), total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
