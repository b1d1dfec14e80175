"""Get an exported program ready for `torch.onnx.export`, so that nothing in it needs decomposing.

The exporter decomposes a program by tracing it again, twice, which takes minutes for a 61-layer model. The graphs made here
are ATen ops its translation library knows already, but for a few dtype casts (translated by us) and the in-place writes
of MoE routers, made functional below. Any other op sends the program the exporter's usual way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from ...compat import torch_private

aten = torch.ops.aten


class Translatable(ExportedProgram):
    """A program that has nothing to decompose."""

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        return self


def translatable(program: ExportedProgram, known: frozenset[Any]) -> ExportedProgram:
    """A copy of `program` for the exporter. known: our own translations.

    Its parameters are fake tensors: the exporter looks at their shapes and types only, and meta tensors would clash with
    the constants it computes.
    """
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.output(graph.graph_copy(program.graph, mapping))
    output.meta.update(next(iter(reversed(program.graph.nodes))).meta)
    direct = _make_functional(graph) and not _unknown(graph, known)
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
    """x.div_(y) => x = x.div(y), for every value that is written in place. False if one may be seen through a view."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            continue
        written, functional = node.args[0], _functional(node.target)
        if not isinstance(written, Node) or functional is None or _is_view(written) or written.op == "placeholder":
            return False
        if any(_is_view(user) and order[user] < order[node] for user in written.users):
            return False
        node.target = functional
        for user in [user for user in written.users if order[user] > order[node]]:
            user.replace_input_with(written, node)
    return True


def _functional(target: Any) -> Any:
    """aten.div_.Tensor -> aten.div.Tensor; None when there is no such op, or more than its first argument is written."""
    written = [argument for argument in target._schema.arguments if argument.alias_info is not None]
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    if len(written) != 1 or written[0] is not target._schema.arguments[0] or packet is None:
        return None
    return getattr(packet, target._overloadname, None)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)
