"""ONNX in tests: one node of domain `mla2dsa` as a model, sessions on the CPU, and the full checker on a written model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo
from torch import Tensor

from mla2dsa.exporters.onnx_model.functions import BUFFER, local_function
from mla2dsa.exporters.onnx_model.nodes import DOMAIN, OPSET, VERSION, register_schemas

ELEMENT = {torch.float32: 1, torch.float16: 10, torch.int32: 6, torch.int64: 7}
OUTPUT_RANK = {"LightningIndexer": 3, "SparseMLA": 4, "CacheWrite": 3, "MoEExperts": 2}


def node_model(name: str, inputs: dict[str, Tensor], buffer: int = BUFFER, **attributes: Any) -> onnx.ModelProto:
    """A model of one node and its local function, every dim dynamic. Fully checked."""
    register_schemas()
    first = next(iter(inputs.values()))
    element = TensorProto.INT32 if name == "LightningIndexer" else ELEMENT[first.dtype]
    if name != "MoEExperts":
        attributes["plugin_namespace"] = DOMAIN
    graph = helper.make_graph(
        [helper.make_node(name, list(inputs), ["out"], domain=DOMAIN, **attributes)],
        name,
        [info(field, ELEMENT[tensor.dtype], tensor.dim()) for field, tensor in inputs.items()],
        [info("out", element, OUTPUT_RANK[name])],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[local_function(name, attributes.get("activation", "silu"), buffer)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def info(name: str, element: int, rank: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, [f"{name}_{axis}" for axis in range(rank)])


def session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    """On the CPU provider alone, one thread, no custom-op library."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_node(name: str, inputs: dict[str, Tensor], buffer: int = BUFFER, **attributes: Any) -> Tensor:
    made = session(node_model(name, inputs, buffer, **attributes))
    return torch.from_numpy(made.run(None, {field: tensor.numpy() for field, tensor in inputs.items()})[0])


def external_tensors(folder: Path) -> dict[str, ExternalDataInfo]:
    """Where the weights of folder/model.onnx lie, by name."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    tensors = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    return {tensor.name: ExternalDataInfo(tensor) for tensor in tensors}


def with_data(folder: Path) -> onnx.ModelProto:
    """The model with its weights inside: onnx's own loader and checker refuse files that have a second hard link."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            where = ExternalDataInfo(tensor)
            with (folder / where.location).open("rb") as file:
                file.seek(where.offset)
                tensor.raw_data = file.read(where.length)
            del tensor.external_data[:]
            tensor.data_location = TensorProto.DEFAULT
    return model


def numpy_type(dtype: str) -> Any:
    return {"float32": np.float32, "float16": np.float16}[dtype]
