"""Get an exported program ready for `torch.onnx.export`, so that nothing in it needs decomposing.

The exporter decomposes a program by tracing it again, twice, which takes minutes for a 61-layer model. The graphs made here
are ATen ops its translation library knows already, but for a few dtype casts (translated by us) and the in-place writes
of MoE routers, made functional below. Any other op sends the program the exporter's usual way, which functionalises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node, map_arg

from ...compat import torch_private
from ...compat.aliasing import Memory, shared, written
from ...errors import UserError
from .real_numbers import real_numbers

aten = torch.ops.aten


class Translatable(ExportedProgram):
    """A program that has nothing to decompose."""

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        return self


def translatable(program: ExportedProgram, known: frozenset[Any]) -> ExportedProgram:
    """A copy of `program` for the exporter. known: our own translations.

    Its parameters are fake tensors: the exporter looks at their shapes and types only, and meta tensors would clash with
    the constants it computes. Raises UserError for an in-place write that the exporter would lose.
    """
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.output(graph.graph_copy(program.graph, mapping))
    output.meta.update(next(iter(reversed(program.graph.nodes))).meta)
    real_numbers(graph)
    direct = _make_functional(graph) and not _unknown(graph, known)
    untold = None if direct else Memory(program.graph).untold_write()
    if untold is not None:
        raise UserError(f"{untold} cannot be functionalised for ONNX: write out of place, or into a clone")
    return (Translatable if direct else ExportedProgram)(
        root=GraphModule(program.graph_module, graph),
        graph=graph,
        graph_signature=program.graph_signature,
        state_dict=_fakes(program),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _fakes(program: ExportedProgram) -> dict[str, Tensor]:
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    state: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.target in program.state_dict:
            fake = values[spec.arg.name]
            state[spec.target] = (
                torch.nn.Parameter(fake, requires_grad=False) if spec.kind == InputKind.PARAMETER else fake
            )
    return state


def _unknown(graph: Graph, known: frozenset[Any]) -> bool:
    targets = {node.target for node in graph.nodes if node.op == "call_function"}
    return not torch_private.onnx_exporter_knows(targets - known)


def _make_functional(graph: Graph) -> bool:
    """x.div_(y) => x = x.div(y), for every value that is written in place. False if another value may share its memory."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        targets = written(node)
        if not targets:
            continue
        functional, value = _functional(node, targets), next(iter(targets))
        if functional is None or value.op != "call_function" or shared(value):
            return False
        if any(value in shared(user) and order[user] < order[node] for user in value.users):
            return False
        node.target = functional
        for user in [user for user in value.users if order[user] > order[node]]:
            user.replace_input_with(value, node)
    return True


def _functional(node: Node, targets: Mapping[Node, bool]) -> Any:
    """aten.div_.Tensor -> aten.div.Tensor. None when there is no such op, it writes more than its first argument, or the
    functional op gives another dtype: that of x.div_(y) is always x's."""
    if list(targets.items()) != [(node.args[0], True)]:
        return None
    name, _, overload = node.target.name().removeprefix("aten::").partition(".")  # type: ignore[union-attr]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    functional = getattr(packet, overload or "default", None)
    if functional is None:
        return None
    result = functional(*map_arg(node.args, _value), **map_arg(dict(node.kwargs), _value))
    return functional if result.dtype == _value(node).dtype else None


def _value(node: Node) -> Any:
    return node.meta["val"]
