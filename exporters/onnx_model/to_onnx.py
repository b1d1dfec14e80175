"""A cached DSA program as an ONNX model: custom nodes, local functions for them, weights left where they are.

    torch.export program --translate--> onnx graph --weights--> external data --optimise--> + local functions --> model.onnx

Nothing here reads a weight, except those that have to be written (see `external_data`). bfloat16 models have no kernels in
onnxruntime's CPU provider: they are for TensorRT. A checkpoint in another float type than the graph is used as it lies, with
a Cast in the graph: onnxruntime folds it when it loads the model, at the cost of the converted copy in memory. Experts are
cast one at a time as they are used, so they stay as large in memory as they are on disk.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import serde
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ... import __version__
from ...compat import torch_private
from ...errors import UserError
from ...files.writing import write_new
from .external_data import Placement, Stored
from .functions import local_function
from .moe import place_experts
from .nodes import DOMAIN, OPSET, VERSION, register_schemas, translations
from .optimise import optimise
from .translatable import translatable

MODEL_FILE = "model.onnx"
LAYER = "mla2dsa.layer"  # metadata key of a node: the module it comes from
_IR_VERSION = 10
_WITHOUT_INDEXER = ("SparseMLA", "CacheWrite_1")  # a layer that attends to what an earlier one selected
_LAYER_NODES = ("LightningIndexer", "CacheWrite_0", *_WITHOUT_INDEXER)  # index keys are written before latents


@dataclass(frozen=True)
class Weights:
    """How to find a program's tensors in the checkpoint.

    shared: the name a tied tensor goes by (itself if it is not tied). stored: its checkpoint tensors in order, one, or for
    stacked experts gate and up of each in turn, or down of each.
    """

    shared: Callable[[str], str]
    stored: Callable[[str], Sequence[Stored]]


def export_onnx(
    program: ExportedProgram,
    layers: Mapping[str, bool],
    outputs: Sequence[str],
    weights: Weights,
    folder: Path,
    *,
    copy_weights: bool = False,
    functions: bool = True,
) -> Placement:
    """Write `folder`/model.onnx with all it needs beside it; returns where the weights went.

    layers: names of the program's DSA layers in graph order, and whether each has an indexer. outputs: names for its outputs.
    functions: False leaves the local functions out (a runtime then needs kernels for the nodes; TensorRT before 10.7 prefers
    functions to plugins).
    Raises UserError when an op has no ONNX form.
    """
    model = _translate(program)
    graph = model.graph
    _name_interface(graph, outputs)
    _name_nodes(graph, layers)
    placement = Placement(folder, copy_weights)
    try:
        activation = place_experts(graph, weights.stored, placement)
        _place_weights(graph, program, weights, placement)
    finally:
        placement.close()
    optimise(model)
    _finish(model, activation, functions)
    write_new(folder / MODEL_FILE, serde.serialize_model(model).SerializeToString())
    return placement


def _translate(program: ExportedProgram) -> ir.Model:
    register_schemas()
    table = translations()
    with _quiet():
        try:
            exported = torch.onnx.export(
                translatable(program, frozenset(table)), (), dynamo=True, custom_translation_table=table,
                opset_version=OPSET, optimize=False, verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"torch.onnx cannot export this program: {_reason(error)}") from error
    model: ir.Model = exported.model  # type: ignore[union-attr]
    return model


def _reason(error: Exception) -> str:
    """The innermost message, in one line: the exporter wraps it in a page of advice."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    return (str(inner).strip().splitlines() or [type(inner).__name__])[0][:300]


def _name_interface(graph: ir.Graph, outputs: Sequence[str]) -> None:
    """Names of the outputs, and of the dynamic dims: batch, seq, cache_length."""
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    sizes: dict[str, str] = {}
    for value in graph.inputs:
        assert value.shape is not None
        names = ("batch", "cache_length") if str(value.name).startswith("past_") else ("batch", "seq")
        for dim, name in zip(value.shape, names, strict=False):
            sizes.setdefault(str(dim), name)
    symbol = re.compile(r"\b(?:" + "|".join(map(re.escape, sizes)) + r")\b")
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [d if isinstance(d, int) else symbol.sub(lambda m: sizes[m[0]], str(d)) for d in value.shape]
            value.shape = ir.Shape([int(d) if isinstance(d, int) or d.isdigit() else d for d in dims])


def _names_of_ours(layers: Mapping[str, bool]) -> dict[str, Iterator[tuple[str, str]]]:
    """(layer, name) of our nodes in graph order, by op."""
    found: dict[str, list[tuple[str, str]]] = {}
    for layer, indexed in layers.items():
        for name in _LAYER_NODES if indexed else _WITHOUT_INDEXER:
            found.setdefault(name.partition("_")[0], []).append((layer, f"{layer}/{name}"))
    return {op: iter(names) for op, names in found.items()}


def _name_nodes(graph: ir.Graph, layers: Mapping[str, bool]) -> None:
    """Nodes are called by module and op; ours also carry the layer as metadata. Everything else about torch goes."""
    ours = _names_of_ours(layers)
    for number, node in enumerate(graph):
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        modules = re.findall(r"'([^']*)'", scopes)[:-1]
        module = next((name for name in reversed(modules) if name and not name.startswith("_")), "")
        node.name = f"{module}/{node.op_type}_{number}" if module else f"{node.op_type}_{number}"
        node.metadata_props.clear()
        if node.domain == DOMAIN:
            if node.op_type in ours:
                module, node.name = next(ours[node.op_type])
            node.metadata_props[LAYER] = module
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _place_weights(graph: ir.Graph, program: ExportedProgram, weights: Weights, placement: Placement) -> None:
    """Every parameter still in the graph becomes external data; computed constants stay inside the model."""
    parameters = {
        spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }
    first = graph[0]
    placed: dict[str, ir.Value] = {}
    for name in [n for n in graph.initializers if n in parameters and n not in program.constants]:
        declared = graph.initializers.pop(name)
        if not declared.uses():
            continue
        shared = weights.shared(name)
        if shared not in placed:
            placed[shared] = _place(graph, first, declared, weights.stored(shared), placement)
        ir.convenience.replace_all_uses_with(declared, placed[shared])


def _place(
    graph: ir.Graph, first: ir.Node, declared: ir.Value, stored: Sequence[Stored], placement: Placement
) -> ir.Value:
    """The tensor in the dtype that the graph declares, cast from the stored one where they differ."""
    name = stored[0].name
    tensor = placement.tensor(stored[0])
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    assert declared.dtype is not None
    if tensor.dtype == declared.dtype:
        return value
    cast = ir.node("Cast", [value], {"to": declared.dtype}, name=f"{name}/Cast")
    cast.outputs[0].name, cast.outputs[0].shape = f"{name}.cast", tensor.shape
    cast.outputs[0].type = ir.TensorType(declared.dtype)
    graph.insert_before(first, [cast])
    return cast.outputs[0]


def _finish(model: ir.Model, activation: str | None, functions: bool) -> None:
    used = sorted({node.op_type for node in model.graph if node.domain == DOMAIN})
    if functions:
        for name in used:
            function = serde.deserialize_function(local_function(name, activation or "silu"))
            model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version = "mla2dsa", __version__
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "dsa"


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """The exporter's warnings are about packages and types that do not concern a language model."""
    logger = torch_private.onnx_exporter_log()
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
