"""A few lines of torch as an exported program, and its nodes: shared by the unit tests of the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node


class _Lines(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def program_of(
    function: Callable[..., Any] | nn.Module, *inputs: Tensor, dynamic: Sequence[int] | None = (0, 1)
) -> ExportedProgram:
    """`function` exported; these axes of every input are dynamic, as far as it has them. Inputs share sizes as torch finds."""
    module = function if isinstance(function, nn.Module) else _Lines(function)
    axes = [{axis: Dim.DYNAMIC for axis in dynamic or () if axis < tensor.dim()} for tensor in inputs]
    shapes: Any = tuple(axes) if isinstance(function, nn.Module) else (tuple(axes),)
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs, dynamic_shapes=shapes if dynamic else None, strict=False)


def inputs_of(program: ExportedProgram) -> list[Node]:
    """The nodes of the program's own inputs, in order."""
    names = list(program.graph_signature.user_inputs)
    by_name = {node.name: node for node in program.graph.nodes}
    return [by_name[str(name)] for name in names]


def outputs_of(program: ExportedProgram) -> list[Node]:
    (output,) = program.graph.find_nodes(op="output")
    return list(output.args[0])


def nodes_of(program: ExportedProgram, op: str) -> list[Node]:
    """Every call of the ATen op `op` ("cos", "slice"), in graph order."""
    return [n for n in program.graph.nodes if n.op == "call_function" and op_name(n) == op]


def node_of(program: ExportedProgram, op: str) -> Node:
    (node,) = nodes_of(program, op)
    return node


def op_name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]
