"""A node's arguments with their types: fx says only that an argument may be anything, a pass knows what its op takes.

An argument is asked for by its place and its name in the op's schema, since a graph may hold it either way. One that is not
what was expected raises `UnexpectedArgument`, which names the node: while attentions are matched it becomes a `Miss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node
from torch.fx.node import Argument


class UnexpectedArgument(Exception):
    """A node's argument is not of the kind its op takes, as far as the passes know the op. `node` is the one to blame."""

    def __init__(self, node: Node, name: str, found: object, expected: str) -> None:
        super().__init__(f"{node.target} of {node.name} has {found!r} as {name}, expected {expected}")
        self.node = node


def argument(node: Node, index: int, name: str) -> Argument:
    """Whatever stands there; None when nothing does."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name)


def node_arg(node: Node, index: int, name: str) -> Node:
    found = argument(node, index, name)
    if not isinstance(found, Node):
        raise UnexpectedArgument(node, name, found, "a value of the graph")
    return found


def optional_node(node: Node, index: int, name: str) -> Node | None:
    return None if argument(node, index, name) is None else node_arg(node, index, name)


def items_arg(node: Node, index: int, name: str) -> list[Argument]:
    """A list or tuple of anything, as a graph's output has it."""
    found = argument(node, index, name)
    if not isinstance(found, tuple | list):
        raise UnexpectedArgument(node, name, found, "a list")
    return list(found)


def int_arg(node: Node, index: int, name: str, default: int | None = None) -> int:
    """A plain number; a size of the graph raises."""
    found = argument(node, index, name)
    found = default if found is None else found
    if not isinstance(found, int) or isinstance(found, bool):
        raise UnexpectedArgument(node, name, found, "an integer")
    return found


def ints_arg(node: Node, index: int, name: str) -> list[int]:
    found = items_arg(node, index, name)
    numbers = [item for item in found if isinstance(item, int)]
    if len(numbers) != len(found):
        raise UnexpectedArgument(node, name, found, "a list of integers")
    return numbers


def number_arg(node: Node, index: int, name: str, default: float | None = None) -> float:
    found = argument(node, index, name)
    found = default if found is None else found
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise UnexpectedArgument(node, name, found, "a number")
    return float(found)


def optional_number(node: Node, index: int, name: str) -> float | None:
    return None if argument(node, index, name) is None else number_arg(node, index, name)


def flag_arg(node: Node, index: int, name: str, default: bool = False) -> bool:
    found = argument(node, index, name)
    found = default if found is None else found
    if not isinstance(found, bool):
        raise UnexpectedArgument(node, name, found, "true or false")
    return found


def operation(node: Node) -> Callable[..., Any]:
    """The op that a call node calls."""
    if not callable(node.target):
        raise UnexpectedArgument(node, "target", node.target, "an op")
    return node.target
