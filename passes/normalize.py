"""Normalize: make a freshly exported graph functional where attention is concerned, without re-tracing it.

    new_empty -> slice -> copy_        =>  new_empty -> slice_scatter        (how K is assembled in transformers 5)
    wrap_with_set_grad_enabled(body)   =>  body, inlined                     (rotary tables computed under no_grad)

`run_decompositions({})` does the same and takes minutes on a 61-layer model; this takes milliseconds.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from .graph.arguments import argument, int_arg, node_arg
from .graph.graph_eval import BLANK
from .manager import BrokenPass, Pass, Report, Work

aten = torch.ops.aten

_END = 2**63 - 1
_SLICE = {1: "dim", 2: "start", 3: "end", 4: "step"}


@dataclass(frozen=True)
class Normalized:
    """How much there was to do."""

    grad_regions: int
    buffer_fills: int


@dataclass(frozen=True)
class Normalize(Pass):
    name: ClassVar[str] = "normalize"

    def requires(self, work: Work) -> None:
        """Any exported program."""

    def run(self, work: Work) -> Report:
        graph, module = work.editor.graph, work.editor.module
        regions = [node for node in graph.nodes if _is_grad_region(node)]
        for region in regions:
            _inline_grad_region(module, region)
        order = {node: place for place, node in enumerate(graph.nodes)}
        buffers = [node for node in graph.nodes if node.op == "call_function" and node.target in BLANK]
        filled = [_fill_functionally(graph, buffer, order) for buffer in buffers]
        left = [buffer for buffer, done in zip(buffers, filled, strict=True) if done is False]
        done = Normalized(len(regions), filled.count(True))
        return Report(
            did=(
                f"{done.grad_regions} regions without gradients inlined, {done.buffer_fills} filled buffers made functional",
            ),
            could_not=tuple(f"make {buffer.name} functional: it is read between the writes into it" for buffer in left),
            fact=done,
        )

    def ensures(self, work: Work) -> None:
        region = next((node for node in work.editor.graph.nodes if _is_grad_region(node)), None)
        if region is not None:
            raise BrokenPass(self.name, "a region without gradients is left", region.name)


def _is_grad_region(node: Node) -> bool:
    return str(node.target) == "wrap_with_set_grad_enabled"


def _inline_grad_region(graph_module: GraphModule, call: Node) -> None:
    """Gradients do not exist in an inference graph, so switching them off has no meaning: keep the body only."""
    body_ref = node_arg(call, 1, "wrapped_func")
    body: GraphModule = getattr(graph_module, str(body_ref.target))
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    mapping = {inner: node_arg(call, 2 + number, inner.name) for number, inner in enumerate(placeholders)}
    with graph_module.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op not in ("placeholder", "output"):
                mapping[node] = graph_module.graph.node_copy(node, lambda n: mapping[n])
    output = next(n for n in body.graph.nodes if n.op == "output")
    returned = output.args[0] if isinstance(output.args[0], tuple | list) else output.args
    results = [mapping[item] for item in returned if isinstance(item, Node)]
    for user in list(call.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[int_arg(user, 1, "index")])
            graph_module.graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(results[0])
    graph_module.graph.erase_node(call)
    if not body_ref.users:
        graph_module.graph.erase_node(body_ref)


def _fill_functionally(graph: Graph, buffer: Node, order: dict[Node, int]) -> bool | None:
    """True when every write into `buffer` became a slice_scatter, False when somebody reads in between, None without writes."""
    fills: list[tuple[Node, Node]] = []
    for view in [u for u in buffer.users if u.target is aten.slice.Tensor and u.args[0] is buffer]:
        writers = list(view.users)
        if (
            len(writers) == 1
            and writers[0].target is aten.copy_.default
            and writers[0].args[0] is view
            and not writers[0].users
        ):
            fills.append((view, writers[0]))
    fills.sort(key=lambda pair: order[pair[1]])
    readers = [u for u in buffer.users if u not in {view for view, _ in fills}]
    if not fills:
        return None
    if any(order.get(reader, _END) < order[fills[-1][1]] for reader in readers):
        return False
    current = buffer
    for view, write in fills:
        dim, start, end, step = (argument(view, place, name) for place, name in _SLICE.items())
        bounds = (dim or 0, start or 0, _END if end is None else end, step or 1)
        with graph.inserting_before(write):
            scattered = graph.call_function(aten.slice_scatter.default, (current, write.args[1], *bounds))
        scattered.meta.update(buffer.meta)
        order[scattered] = order[write]  # it may read another buffer, which must not take it for a late reader
        current = scattered
    for reader in readers:
        reader.replace_input_with(buffer, current)
    for view, write in fills:
        graph.erase_node(write)
        graph.erase_node(view)
    return True
