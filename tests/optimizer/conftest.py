"""Fixtures that several files of this folder share."""

from __future__ import annotations

from typing import Any

import pytest

from mla2dsa.optimizer.indexer import calibrate


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers whose closed form is computed, as it happens."""
    names: list[str] = []
    fit = calibrate._fit

    def counting(site: Any, *arguments: Any) -> Any:
        names.append(site.name)
        return fit(site, *arguments)

    monkeypatch.setattr(calibrate, "_fit", counting)
    return names
