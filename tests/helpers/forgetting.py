"""A library that no longer has a private name, as far as compat can see."""

from __future__ import annotations

import builtins
import re
import sys
from importlib import import_module
from operator import attrgetter
from types import ModuleType
from typing import Any

import pytest

from mla2dsa.compat import private_names
from mla2dsa.compat.private_names import Library


def forget(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """`name`: as `Library.names` and `Library.attributes` spell it."""
    module, _, path = name.rpartition(":")
    if module and not path:
        monkeypatch.setitem(sys.modules, module, None)
        return
    inside, _, gone = path.rpartition(".")
    found = import_module(module) if module else None
    holder = attrgetter(inside)(found) if found and inside else found

    def lookup(owner: Any, attribute: str) -> Any:
        of_this = owner is holder if module else not isinstance(owner, ModuleType)
        if attribute == gone and of_this:
            raise AttributeError(attribute)
        return builtins.getattr(owner, attribute)

    monkeypatch.setattr(private_names, "getattr", lookup, raising=False)


def complaint(library: Library, name: str) -> str:
    """A pattern for all that is said when `name` is gone."""
    moved = re.escape(name.replace(":", ".").rstrip("."))
    return rf"^{library.name} \S+ moved {moved}; mla2dsa supports {library.name} {re.escape(library.supported)}: install one of those$"
