"""MoE experts in ONNX: one node per run of experts that lie one after the other in the checkpoint.

safetensors files are sorted by tensor name, so a layer's experts, stored one by one, usually form one run:

    experts.0.down_proj | experts.0.gate_proj | experts.0.up_proj | experts.1.down_proj | experts.10... | experts.100...

Each of the three holds I * D elements, so the run is one tensor [3n, I, D] in place; which of an expert's three is which
are the attributes gate, up, down of the node, and the order of experts is a table from expert to place. A layer that spans
two files gives two nodes whose results add up: a node ignores experts that are not its own. Experts that lie otherwise,
and quantised ones, are written, an expert at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..errors import UserError
from .external_data import Placement, Stored
from .onnx_ops import DOMAIN, STACKED_MOE

MAX_RUNS = 4  # per layer; more nodes than that cost more than writing the smaller runs costs disk
Resolve = Callable[[str], Sequence[Stored]]


@dataclass(frozen=True)
class _Expert:
    """gate, up and down of expert `number`."""

    number: int
    parts: tuple[Stored, Stored, Stored]

    @property
    def order(self) -> tuple[int, ...] | None:
        """Places of gate, up, down among the three, when they lie side by side in one file; else None."""
        first = min(part.location.offset for part in self.parts)
        size = self.parts[0].location.nbytes
        same = {(part.location.file, part.location.dtype, part.location.nbytes, part.plain) for part in self.parts}
        gaps = [divmod(part.location.offset - first, max(1, size)) for part in self.parts]
        together = sorted(place for place, _ in gaps) == [0, 1, 2] and not any(rest for _, rest in gaps)
        return tuple(place for place, _ in gaps) if len(same) == 1 and together and self.parts[0].plain else None

    @property
    def offset(self) -> int:
        return min(part.location.offset for part in self.parts)


def place_experts(graph: ir.Graph, resolve: Resolve, placement: Placement) -> str | None:
    """Turn every node with stacked experts into nodes with experts in place; returns their activation (None: no MoE)."""
    activations = set()
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type == STACKED_MOE]:
        gate_up, down = _initializer(node.inputs[3]), _initializer(node.inputs[4])
        experts = _experts(gate_up, resolve(str(gate_up.name)), resolve(str(down.name)))
        _replace(graph, node, experts, down, placement)
        activations.add(node.attributes.get_string("activation"))
        for stacked in (gate_up, down):
            _drop(graph, stacked)
    if len(activations) > 1:
        raise UserError(f"experts with activations {', '.join(sorted(activations))} in one model cannot be exported yet")
    return activations.pop() if activations else None


def _initializer(value: ir.Value | None) -> ir.Value:
    """The weight behind a slice of all its experts."""
    assert value is not None
    producer = value.producer()
    return value if producer is None else _initializer(producer.inputs[0])


def _drop(graph: ir.Graph, weight: ir.Value) -> None:
    for user, _ in list(weight.uses()):
        graph.remove(user, safe=True)
    del graph.initializers[str(weight.name)]


def _experts(weight: ir.Value, gate_up: Sequence[Stored], down: Sequence[Stored]) -> list[_Expert]:
    if len(gate_up) != 2 * len(down):
        raise UserError(
            f"{weight.name}: the checkpoint stores its experts stacked; expected one gate_proj, up_proj and down_proj per expert"
        )
    pairs = zip(gate_up[::2], gate_up[1::2], down, strict=True)
    return [_Expert(number, parts) for number, parts in enumerate(pairs)]


def _runs(experts: Sequence[_Expert], copy: bool) -> tuple[list[list[_Expert]], list[_Expert]]:
    """(runs to use in place, at most MAX_RUNS; experts to write)."""
    if copy:
        return [], list(experts)
    runs: list[list[_Expert]] = []
    for expert in sorted(experts, key=lambda e: (e.parts[0].location.file, e.offset)):
        if expert.order is None:
            continue
        last = runs[-1][-1] if runs else None
        if last is not None and _follows(expert, last):
            runs[-1].append(expert)
        else:
            runs.append([expert])
    runs = sorted(runs, key=len, reverse=True)[:MAX_RUNS]
    placed = {expert.number for run in runs for expert in run}
    return runs, [expert for expert in experts if expert.number not in placed]


def _follows(expert: _Expert, last: _Expert) -> bool:
    here, before = expert.parts[0].location, last.parts[0].location
    same = (here.file, here.dtype, here.nbytes, expert.order) == (before.file, before.dtype, before.nbytes, last.order)
    return same and expert.offset == last.offset + 3 * here.nbytes


def _replace(
    graph: ir.Graph, node: ir.Node, experts: Sequence[_Expert], down: ir.Value, placement: Placement
) -> None:
    assert down.shape is not None
    width, inner = int(down.shape[1]), int(down.shape[2])  # type: ignore[arg-type]
    runs, others = _runs(experts, placement.copy_weights)
    prefix = str(down.name).removesuffix(".down_proj")
    sums: list[ir.Value] = []
    new: list[ir.Node] = []
    for number, (members, order, tensor) in enumerate(_tensors(runs, others, prefix, (inner, width), placement)):
        weights = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(weights)
        index = node.inputs[1]
        if [expert.number for expert in members] != list(range(len(experts))):
            index, added = _renumber(graph, f"{prefix}.place.{number}", index, members, len(experts))
            new += added
        attributes = dict(zip(("gate", "up", "down"), order, strict=True))
        activation = node.attributes.get_string("activation")
        call = ir.node(
            "MoEExperts", [node.inputs[0], index, node.inputs[2], weights], domain=DOMAIN,
            attributes={**attributes, "activation": activation}, name=f"{prefix}/MoEExperts_{number}",
        )  # fmt: skip
        call.metadata_props.update(node.metadata_props)
        new.append(call)
        sums.append(_like(call.outputs[0], node.outputs[0]))
    while len(sums) > 1:
        total = ir.node("Add", sums[:2], name=f"{prefix}/Add_{len(sums)}")
        new.append(total)
        sums = [_like(total.outputs[0], node.outputs[0]), *sums[2:]]
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(node.outputs[0], sums[0])
    graph.remove(node, safe=True)


def _tensors(
    runs: Sequence[Sequence[_Expert]], others: Sequence[_Expert], prefix: str, size: tuple[int, int], placement: Placement
) -> Iterator[tuple[Sequence[_Expert], tuple[int, ...], ir.ExternalTensor]]:
    for number, run in enumerate(runs):
        place, order = run[0].parts[0].location, run[0].order
        shape = (3 * len(run), *size)
        nbytes = math.prod(shape) * (place.nbytes // math.prod(size))
        name = f"{prefix}.in_place.{number}"
        assert order is not None
        yield run, order, placement.region(name, place.file, run[0].offset, nbytes, place.dtype, shape)
    if others:
        parts = [part for expert in others for part in expert.parts]
        yield others, (0, 1, 2), placement.write(f"{prefix}.written", parts, (3 * len(others), *size))


def _renumber(
    graph: ir.Graph, name: str, index: ir.Value | None, members: Sequence[_Expert], count: int
) -> tuple[ir.Value, list[ir.Node]]:
    """Expert ids -> places in a run, the run's length for experts outside of it (and for ids that are no expert)."""
    table = np.full(count + 1, len(members), dtype=np.int64)
    for place, expert in enumerate(members):
        table[expert.number] = place
    constants = {"table": table, "none": np.int64(0), "count": np.int64(count)}
    values = {}
    for key, array in constants.items():
        tensor = ir.tensor(np.asarray(array), name=f"{name}.{key}")
        values[key] = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(ir.DataType.INT64), const_value=tensor
        )
        graph.register_initializer(values[key])
    nodes = [ir.node("Cast", [index], {"to": ir.DataType.INT64})]

    def then(op: str, *inputs: ir.Value) -> ir.Value:
        nodes.append(ir.node(op, list(inputs)))
        return nodes[-1].outputs[0]

    ids = nodes[0].outputs[0]
    known = then("And", then("GreaterOrEqual", ids, values["none"]), then("Less", ids, values["count"]))
    inside = then("Where", known, ids, values["count"])
    place = then("Gather", values["table"], inside)
    for number, node in enumerate(nodes):
        node.name = f"{name}/{node.op_type}_{number}"
    return place, nodes


def _like(value: ir.Value, model: ir.Value) -> ir.Value:
    value.shape, value.type = model.shape, model.type
    return value
