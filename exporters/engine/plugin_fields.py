"""Gives each DSA node of an ONNX model the two fields that the TensorRT plugin works from (docs/tensorrt.md).

    model.onnx: SparseMLA(q, kv, indices; scale, kv_lora_rank)
      --types and sizes of the node--> op_program --compile for each architecture--> SparseMLA(...; ..., program, kernels)

The local functions of these nodes are taken out: TensorRT before 10.7 would prefer them to the plugin without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from ...errors import UserError
from ...files.dtypes import ELEMENT_TYPES
from ...kernels.gpu.binaries.bundle import bundled, write_bundle
from ...kernels.gpu.binaries.compile import Compiled
from ...kernels.gpu.binaries.manifest import kernel_name
from ...kernels.gpu.binaries.pack import compile_all
from ...kernels.gpu.programs.op_program import OpProgram, op_program, spec_of
from ...kernels.gpu.programs.plugin_text import write_op
from ...kernels.gpu.programs.program import Variant
from ...kernels.op_spec import NODES
from ..onnx_model.nodes import DOMAIN
from ..onnx_model.to_onnx import LAYER

PROGRAM, KERNELS = "program", "kernels"  # names of the fields
_TYPES = {
    onnx.TensorProto.DataType.Value(kind.onnx): kind.triton for kind in ELEMENT_TYPES if kind.onnx and kind.triton
}


@dataclass(frozen=True)
class PluginNode:
    """A node that is a plugin: its name in the graph, its op, the layer it comes from, and hashes of its fields."""

    name: str
    op: str
    layer: str
    program_sha256: str
    kernels_sha256: str


@dataclass(frozen=True)
class Fields:
    """What a plugin is given."""

    program: str
    kernels: bytes


def attach(
    model: onnx.ModelProto,
    sms: Sequence[int],
    jobs: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[PluginNode]:
    """Set the fields of every DSA node of `model`, in place, and take the local functions of these ops out.

    sms: GPU architectures to compile for. jobs: processes. on_progress: binaries made, of how many.
    Raises UserError when the model has none of these nodes, or one that there is no kernel for.
    """
    nodes = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in NODES]
    if not nodes:
        raise UserError(f"the model has no node {', '.join(NODES)} of domain {DOMAIN}: nothing for the plugin to do")
    known = _types_and_shapes(model)
    programs = [_program(node, known, sms) for node in nodes]
    fields = _fields(dict.fromkeys(programs), jobs, on_progress)
    for node, program in zip(nodes, programs, strict=True):
        _set(node, fields[program])
    kept = [function for function in model.functions if (function.domain, function.name) not in _ours()]
    del model.functions[:]
    model.functions.extend(kept)
    return [_described(node, fields[program]) for node, program in zip(nodes, programs, strict=True)]


def fields_of(model: onnx.ModelProto) -> dict[str, tuple[bytes, bytes]]:
    """Program and kernels of each distinct plugin of a model with fields, by a name made of the op and a hash of both."""
    found: dict[str, tuple[bytes, bytes]] = {}
    for node in model.graph.node:
        fields = {attribute.name: bytes(attribute.s) for attribute in node.attribute}
        if node.domain == DOMAIN and PROGRAM in fields:
            both = fields[PROGRAM], fields[KERNELS]
            found[f"{node.op_type}-{hashlib.sha256(b''.join(both)).hexdigest()[:12]}"] = both
    return found


def _ours() -> set[tuple[str, str]]:
    return {(DOMAIN, name) for name in NODES}


Known = Mapping[str, tuple[str, tuple[int | None, ...]]]


def _types_and_shapes(model: onnx.ModelProto) -> Known:
    """By value name; a dim is None if it is dynamic."""
    found: dict[str, tuple[str, tuple[int | None, ...]]] = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        tensor = value.type.tensor_type
        sizes = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
        found[value.name] = (_TYPES.get(tensor.elem_type, f"ONNX type {tensor.elem_type}"), sizes)
    return found


def _program(node: onnx.NodeProto, known: Known, sms: Sequence[int]) -> OpProgram:
    missing = [name for name in node.input if name not in known]
    if missing:
        raise UserError(f"{node.name}: the model does not say type and shape of {missing[0]}; export it again")
    inputs = [known[name] for name in node.input]
    attributes = {
        attribute.name: onnx.helper.get_attribute_value(attribute)
        for attribute in node.attribute
        if attribute.type in (onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT)
    }
    spec = spec_of(node.op_type)
    try:
        return op_program(spec, [kind for kind, _ in inputs], [shape for _, shape in inputs], attributes, sms)
    except UserError as error:
        raise UserError(f"{node.name}: {error}") from error


def _fields(
    programs: Mapping[OpProgram, None], jobs: int, on_progress: Callable[[int, int], None]
) -> dict[OpProgram, Fields]:
    tasks = list(dict.fromkeys(task for program in programs for task in program.binaries()))
    made: dict[Variant, dict[int, Compiled]] = {}
    for (variant, sm), compiled in compile_all(tasks, jobs, None, on_progress):
        made.setdefault(variant, {})[sm] = compiled
    return {program: Fields(write_op(program, kernel_name), _bundle(program, made)) for program in programs}


def _bundle(program: OpProgram, made: Mapping[Variant, Mapping[int, Compiled]]) -> bytes:
    wanted: dict[Variant, list[int]] = {}
    for variant, sm in program.binaries():
        wanted.setdefault(variant, []).append(sm)
    return write_bundle({kernel_name(it): bundled(it, {sm: made[it][sm] for sm in sms}) for it, sms in wanted.items()})


def _set(node: onnx.NodeProto, fields: Fields) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in (PROGRAM, KERNELS)]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.append(onnx.helper.make_attribute(PROGRAM, fields.program))
    node.attribute.append(onnx.helper.make_attribute(KERNELS, fields.kernels))


def _described(node: onnx.NodeProto, fields: Fields) -> PluginNode:
    layer = next((entry.value for entry in node.metadata_props if entry.key == LAYER), "")
    program = hashlib.sha256(fields.program.encode()).hexdigest()
    return PluginNode(node.name, node.op_type, layer, program, hashlib.sha256(fields.kernels).hexdigest())
