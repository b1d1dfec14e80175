"""Whether progress and the lines that go with it are shown: not with -q."""

from __future__ import annotations

from contextvars import ContextVar

QUIET = ContextVar("quiet", default=False)
