"""How the private names of a library are reached: listed, looked up when they are used, and missed in one clear line."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError


class MovedError(UserError):
    """A library no longer has a private name that mla2dsa relies on: its version is outside of the range that was tested."""


@dataclass(frozen=True)
class Library:
    """A library and what we use of it without its promise.

    supported: the versions that were tested, as in pyproject.toml. names: "module:attribute.attribute", and what it is needed for.
    attributes: "Class.attribute" of objects that cannot be looked up without an object, likewise. Nothing unlisted is found.
    """

    name: str
    supported: str
    names: Mapping[str, str]
    attributes: Mapping[str, str]

    def find(self, name: str) -> Any:
        """One of `names`. Raises MovedError when this version of the library does not have it."""
        self.names[name]
        module, _, path = name.partition(":")
        try:
            found = importlib.import_module(module)
            for part in path.split(".") if path else ():
                found = getattr(found, part)
        except (ModuleNotFoundError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == self.name:
                raise  # it is not installed
            raise self.moved(name.replace(":", ".").rstrip(".")) from error
        return found

    def get(self, owner: Any, attribute: str) -> Any:
        """One of `attributes` of the object `owner`. Raises MovedError when it does not have it."""
        self.attributes[attribute]
        try:
            return getattr(owner, attribute.rpartition(".")[2])
        except AttributeError as error:
            raise self.moved(attribute) from error

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Give one of `attributes`, which `owner` must have, a new value. Raises MovedError when it does not have it."""
        self.get(owner, attribute)
        setattr(owner, attribute.rpartition(".")[2], value)

    def moved(self, name: str) -> MovedError:
        """The error for a name that is gone."""
        version = importlib.import_module(self.name).__version__
        return MovedError(
            f"{self.name} {version} moved {name}; mla2dsa supports {self.name} {self.supported}: install one of those"
        )
