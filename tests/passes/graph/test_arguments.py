"""Typed arguments of a node: by place or by name, their defaults, and what is said of one that is of another kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from mla2dsa.passes.graph.arguments import (
    UnexpectedArgument,
    argument,
    flag_arg,
    int_arg,
    ints_arg,
    items_arg,
    node_arg,
    number_arg,
    operation,
    optional_node,
    optional_number,
)

Reader = Callable[..., Any]


def call(*args: Any, **kwargs: Any) -> Node:
    """A node `op(*args, **kwargs)`; "x" stands for a value of the graph."""
    graph = Graph()
    x = graph.placeholder("x")
    placed = [x if arg == "x" else arg for arg in args]
    named = {name: x if arg == "x" else arg for name, arg in kwargs.items()}
    return graph.call_function(torch.ops.aten.alias.default, tuple(placed), named)


GOOD = [
    (int_arg, 3, 3),
    (int_arg, -1, -1),
    (number_arg, 2, 2.0),
    (number_arg, 0.5, 0.5),
    (optional_number, 0.5, 0.5),
    (optional_number, None, None),
    (flag_arg, True, True),
    (ints_arg, [1, 2], [1, 2]),
    (ints_arg, (), []),
    (items_arg, [1, None], [1, None]),
    (optional_node, None, None),
]
BAD = [
    (node_arg, 3, "a value of the graph"),
    (node_arg, None, "a value of the graph"),
    (optional_node, 3, "a value of the graph"),
    (int_arg, True, "an integer"),
    (int_arg, 1.0, "an integer"),
    (int_arg, "x", "an integer"),
    (int_arg, None, "an integer"),
    (number_arg, "x", "a number"),
    (number_arg, False, "a number"),
    (optional_number, "x", "a number"),
    (flag_arg, 1, "true or false"),
    (ints_arg, [1, "two"], "a list of integers"),
    (ints_arg, 1, "a list"),
    (items_arg, None, "a list"),
]


@pytest.mark.parametrize("named", [False, True], ids=["by place", "by name"])
@pytest.mark.parametrize(("read", "given", "expected"), GOOD)
def test_an_argument_is_read(read: Reader, given: Any, expected: Any, named: bool) -> None:
    node = call("x", dim=given) if named else call("x", given)
    got = read(node, 1, "dim")
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize("named", [False, True], ids=["by place", "by name"])
@pytest.mark.parametrize("read", [node_arg, optional_node])
def test_a_value_of_the_graph_is_read(read: Reader, named: bool) -> None:
    node = call(1, dim="x") if named else call(1, "x")
    assert read(node, 1, "dim").name == "x"


@pytest.mark.parametrize(("read", "given", "expected"), BAD)
def test_another_kind_of_argument_is_named(read: Reader, given: Any, expected: str) -> None:
    node = call("x", given)
    with pytest.raises(
        UnexpectedArgument, match=f"^aten.alias.default of alias_default has .* as dim, expected {expected}"
    ):
        read(node, 1, "dim")
    with pytest.raises(UnexpectedArgument) as raised:
        read(node, 1, "dim")
    assert raised.value.node is node


@pytest.mark.parametrize(
    ("read", "default", "expected"), [(int_arg, 0, 0), (number_arg, 0.0, 0.0), (flag_arg, True, True)]
)
def test_an_absent_argument_has_its_default(read: Reader, default: Any, expected: Any) -> None:
    assert read(call("x"), 1, "dim", default) == expected
    assert argument(call("x"), 1, "dim") is None


def test_the_place_wins_over_the_name() -> None:
    assert argument(call("x", 2, dim=3), 1, "dim") == 2


def test_only_a_call_has_an_operation() -> None:
    node = call("x")
    assert operation(node) is torch.ops.aten.alias.default
    with pytest.raises(UnexpectedArgument, match="an op"):
        operation(node.all_input_nodes[0])
