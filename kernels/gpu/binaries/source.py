"""What a kernel is made of, in Python: its source and that of every helper it calls, as one hash."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from types import ModuleType
from typing import Any

from ....compat.triton_private import is_jit, python_function


def source_hash(function: Any) -> str:
    """sha256 over a jit function, the jit functions it calls (not triton's), and the module constants they read.

    It does not depend on where in a file they stand, nor on comments outside of them.
    """
    seen: dict[str, str] = {}
    _collect(function, seen)
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(f"{name}\0{seen[name]}\0".encode())
    return digest.hexdigest()


def _collect(function: Any, seen: dict[str, str]) -> None:
    python = python_function(function)
    name = f"{python.__module__}.{python.__qualname__}"
    if name in seen:
        return
    seen[name] = _text(python)
    for used, value in sorted(_names(python).items()):
        if _is_jit(value):
            _collect(value, seen)
        elif _is_constant(value):
            seen[f"{name}:{used}"] = repr(getattr(value, "value", value))


def _text(function: Any) -> str:
    """From `def` on: decorators do not change what is compiled."""
    source = textwrap.dedent(inspect.getsource(function))
    return source[source.index("def ") :].rstrip()


def _names(function: Any) -> dict[str, Any]:
    """The globals a function names, also those it reaches through a module, and what it closes over."""
    code, scope = function.__code__, function.__globals__
    found = {name: scope[name] for name in code.co_names if name in scope}
    for module_name, module in list(found.items()):
        if isinstance(module, ModuleType) and not module.__name__.startswith("triton"):
            members = vars(module)
            found.update({f"{module_name}.{name}": members[name] for name in code.co_names if name in members})
    return found | dict(inspect.getclosurevars(function).nonlocals)


def _is_jit(value: Any) -> bool:
    return is_jit(value) and not python_function(value).__module__.startswith("triton.")


def _is_constant(value: Any) -> bool:
    return isinstance(getattr(value, "value", value), bool | int | float | str)
