"""MoE experts in ONNX, used where they lie in the checkpoint.

Checkpoints store gate_proj, up_proj and down_proj of every expert one by one, and safetensors files are sorted by name:

    experts.0.down_proj | experts.0.gate_proj | experts.0.up_proj | experts.1.down_proj | experts.10... | experts.100...

Each holds I * D elements, so however they are sorted, neighbours form one tensor [rows, I, D], a slab, in place. A node
MoEExperts reads gate, up and down from a slab each (often the same one), and a table says in which rows an expert's are. A
layer that spans files takes a few nodes, each for the experts whose slabs it has, and their results add up. Experts that do
not fit (quantised ones, mostly) are written, one tensor in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...errors import UserError
from .external_data import Placement, Stored
from .nodes import DOMAIN, STACKED_MOE

MAX_NODES = 16  # per layer that use experts in place; beyond that, writing the rest costs less than more nodes
Resolve = Callable[[str], Sequence[Stored]]
Triple = tuple[Stored, Stored, Stored]  # gate, up, down of one expert
Slab = list[Stored]  # neighbouring tensors of equal size in one file


@dataclass(frozen=True)
class _Group:
    """Experts that share their slabs, of gate, up and down, and the three rows of each, by expert."""

    slabs: tuple[ir.Value, ...]
    rows: dict[int, tuple[int, ...]]


def place_experts(graph: ir.Graph, resolve: Resolve, placement: Placement) -> str | None:
    """Turn every node with stacked experts into nodes with experts in place; returns their activation (None: no MoE)."""
    activations = set()
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type == STACKED_MOE]:
        gate_up, down = _initializer(node.inputs[3]), _initializer(node.inputs[4])
        experts = _experts(gate_up, resolve(str(gate_up.name)), resolve(str(down.name)))
        assert down.shape is not None
        size = (int(down.shape[2]), int(down.shape[1]))  # type: ignore[arg-type]
        prefix = str(down.name).removesuffix(".down_proj")
        _replace(graph, node, _groups(graph, experts, prefix, size, placement), prefix, len(experts))
        activations.add(node.attributes.get_string("activation"))
        for stacked in (gate_up, down):
            _drop(graph, stacked)
    if len(activations) > 1:
        raise UserError(
            f"experts with activations {', '.join(sorted(activations))} in one model cannot be exported yet"
        )
    return activations.pop() if activations else None


def _initializer(value: ir.Value | None) -> ir.Value:
    """The weight behind a slice of all its experts."""
    assert value is not None
    producer = value.producer()
    if producer is None:
        return value
    return _initializer(producer.inputs[0])


def _drop(graph: ir.Graph, weight: ir.Value) -> None:
    for user, _ in list(weight.uses()):
        graph.remove(user, safe=True)
    del graph.initializers[str(weight.name)]


def _experts(weight: ir.Value, gate_up: Sequence[Stored], down: Sequence[Stored]) -> list[Triple]:
    if len(gate_up) != 2 * len(down):
        raise UserError(
            f"{weight.name}: the checkpoint stores its experts stacked; expected one gate_proj, up_proj and down_proj each"
        )
    return list(zip(gate_up[::2], gate_up[1::2], down, strict=True))


def _groups(
    graph: ir.Graph, experts: Sequence[Triple], prefix: str, size: tuple[int, int], placement: Placement
) -> list[_Group]:
    where = {} if placement.copy_weights else _slabs([part for triple in experts for part in triple])
    shared: dict[tuple[int, ...], list[int]] = {}
    others = []
    for number, triple in enumerate(experts):
        slabs = [where[part.name][0] for part in triple if part.name in where]
        if len(slabs) == 3 and len({slab[0].location.dtype for slab in slabs}) == 1:
            shared.setdefault(tuple(map(id, slabs)), []).append(number)
        else:
            others.append(number)
    kept = sorted(shared.values(), key=len, reverse=True)
    others += [number for numbers in kept[MAX_NODES:] for number in numbers]
    values: dict[int, ir.Value] = {}
    groups = []
    for numbers in kept[:MAX_NODES]:
        slabs = [where[part.name][0] for part in experts[numbers[0]]]
        for slab in slabs:
            if id(slab) not in values:
                values[id(slab)] = _add(graph, _in_place(slab, f"{prefix}.slab_{len(values)}", size, placement))
        rows = {number: tuple(where[part.name][1] for part in experts[number]) for number in numbers}
        groups.append(_Group(tuple(values[id(slab)] for slab in slabs), rows))
    if others:
        parts = [part for number in sorted(others) for part in experts[number]]
        written = _add(graph, placement.write(f"{prefix}.written", parts, (len(parts), *size)))
        rows = {number: (3 * i, 3 * i + 1, 3 * i + 2) for i, number in enumerate(sorted(others))}
        groups.append(_Group((written,) * 3, rows))
    return groups


def _slabs(parts: Sequence[Stored]) -> dict[str, tuple[Slab, int]]:
    """Slab and row of every tensor that can be used where it lies, by name."""
    plain = [part for part in parts if part.plain]
    runs: list[Slab] = []
    for part in sorted(plain, key=lambda p: (p.location.file, p.location.offset)):
        here, last = part.location, runs[-1][-1].location if runs else None
        follows = last is not None and here.offset == last.offset + last.nbytes
        if last is not None and follows and _kind(part) == _kind(runs[-1][-1]):
            runs[-1].append(part)
        else:
            runs.append([part])
    return {part.name: (run, row) for run in runs for row, part in enumerate(run)}


def _kind(part: Stored) -> tuple[object, ...]:
    return part.location.file, part.location.dtype, part.location.nbytes


def _in_place(slab: Slab, name: str, size: tuple[int, int], placement: Placement) -> ir.ExternalTensor:
    first = slab[0].location
    nbytes = first.nbytes * len(slab)
    return placement.region(name, first.file, first.offset, nbytes, first.dtype, (len(slab), *size))


def _add(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)  # type: ignore[arg-type]
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, node: ir.Node, groups: Sequence[_Group], prefix: str, count: int) -> None:
    hidden, index, weights = node.inputs[:3]
    activation = node.attributes.get_string("activation")
    new: list[ir.Node] = []
    total: ir.Value | None = None
    for number, group in enumerate(groups):
        table = np.full((count, 3), -1, dtype=np.int64)
        for expert, rows in group.rows.items():
            table[expert] = rows
        rows_value = _add(graph, ir.tensor(table, name=f"{prefix}.rows_{number}"))
        call = ir.node(
            "MoEExperts", [hidden, index, weights, *group.slabs, rows_value], domain=DOMAIN,
            attributes={"activation": activation}, name=f"{prefix}/MoEExperts_{number}",
        )  # fmt: skip
        call.metadata_props.update(node.metadata_props)
        new.append(call)
        result = _like(call.outputs[0], node.outputs[0])
        if total is not None:
            new.append(ir.node("Add", [total, result], name=f"{prefix}/Add_{number}"))
            result = _like(new[-1].outputs[0], node.outputs[0])
        total = result
    assert total is not None
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(node.outputs[0], total)
    graph.remove(node, safe=True)


def _like(value: ir.Value, model: ir.Value) -> ir.Value:
    value.shape, value.type = model.shape, model.type
    return value
