"""What a verification found: checks with their limits, and the figures behind them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .checked import Check
from .evaluate import LayerRecall, TextResult
from .long_tasks import TaskScore


@dataclass(frozen=True)
class Verification:
    """All checks, recall per layer, and the text figures. `origin` says what text it was, or that it was random tokens.
    tasks: questions about long texts."""

    checks: tuple[Check, ...]
    layers: tuple[LayerRecall, ...]
    text: TextResult
    origin: str
    skipped: tuple[str, ...] = field(default=())
    tasks: tuple[TaskScore, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def failure(self) -> str:
        """The first check that failed, as one line."""
        bad = next(check for check in self.checks if not check.passed)
        return f"verification failed: {bad.name}: {bad.value:.3g}, expected at most {bad.limit:.3g} ({bad.detail}); {bad.remedy}"
