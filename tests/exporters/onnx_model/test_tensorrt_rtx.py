"""TensorRT-RTX's own ONNX parser and builder on exported folders: no plugin, only the local functions. Needs no GPU.

An engine is built, not run: to deserialise one TensorRT asks for a driver.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from dsa_checkpoints import NAMES, dsa_checkpoint
from onnx_session import node_model
from rtx import tensorrt_rtx, unload_plugins
from safetensors import safe_open

from mla2dsa.exporters.onnx_model.nodes import DOMAIN
from mla2dsa.files.manifests.export_manifest import EXPORT_MANIFEST
from mla2dsa.optimizer.export import export

trt: Any = tensorrt_rtx()


@pytest.fixture(scope="module", autouse=True)
def no_plugins() -> None:
    """Other tests of this process may have loaded them."""
    unload_plugins()


Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
RANGES = {"batch": (1, 1, 2), "seq": (1, 4, 16), "cache_length": (16, 32, 128)}  # min, opt, max
EMBEDDING = "model.embed_tokens.weight"
MOST_KEYS = 3840  # of TensorRT's TopK


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps the errors: the default logger prints thousands of warnings about node names."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


@dataclass
class Parsed:
    """A network, and what has to live as long: the parser owns the weights it has read."""

    log: Log
    builder: Any
    network: Any
    parser: Any
    accepted: bool

    def refusals(self) -> list[Any]:
        return [self.parser.get_error(index) for index in range(self.parser.num_errors)]

    def build(self, shapes: Shapes) -> bytes | None:
        """The serialized engine for inputs of these (min, opt, max) shapes; None if the builder refuses."""
        config, profile = self.builder.create_builder_config(), self.builder.create_optimization_profile()
        for name, limits in shapes.items():
            profile.set_shape(name, *limits)
        assert config.add_optimization_profile(profile) >= 0
        plan = self.builder.build_serialized_network(self.network, config)
        return None if plan is None else bytes(plan)


def parsed(model: onnx.ModelProto, folder: Path = Path()) -> Parsed:
    """folder: where the model's weights lie."""
    log = Log()
    builder = trt.Builder(log)
    builder.max_threads = 1
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    accepted = parser.parse(model.SerializeToString(), str(folder / "model.onnx"))
    return Parsed(log, builder, network, parser, accepted)


def graph_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 export whose weights stay in the checkpoint's files: the example, and a mixture of experts."""
    checkpoint = dsa_checkpoint(request.param, tmp_path_factory)
    out = tmp_path_factory.mktemp("rtx") / request.param
    return export(checkpoint, out, max_batch=RANGES["batch"][2], max_seq=RANGES["cache_length"][2]).folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Parsed:
    return parsed(graph_of(folder), folder)


def manifest(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / EXPORT_MANIFEST).read_text())
    assert isinstance(found, dict)
    return found


def interface(tensors: list[Any]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    return {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in tensors}


def declared(entries: list[dict[str, Any]]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """The manifest's inputs or outputs as TensorRT lists its own: -1 is a dynamic dim."""
    types = {"int64": trt.int64, "float32": trt.float32}
    return {
        entry["name"]: (types[entry["dtype"]], tuple(-1 if isinstance(dim, str) else dim for dim in entry["shape"]))
        for entry in entries
    }


def profile_of(folder: Path) -> Shapes:
    def shape(entry: dict[str, Any], which: int) -> tuple[int, ...]:
        return tuple(RANGES[dim][which] if isinstance(dim, str) else dim for dim in entry["shape"])

    return {entry["name"]: (shape(entry, 0), shape(entry, 1), shape(entry, 2)) for entry in manifest(folder)["inputs"]}


def test_the_parser_takes_it_without_a_plugin(model: Parsed) -> None:
    assert [refusal.desc() for refusal in model.refusals()] == []
    assert model.accepted
    kinds = Counter(model.network.get_layer(index).type.name for index in range(model.network.num_layers))
    assert kinds["TOPK"] > 0
    assert [kind for kind in kinds if "PLUGIN" in kind] == []


def test_the_network_has_the_inputs_and_outputs_of_the_manifest(folder: Path, model: Parsed) -> None:
    network, entries = model.network, manifest(folder)
    inputs = interface([network.get_input(index) for index in range(network.num_inputs)])
    outputs = interface([network.get_output(index) for index in range(network.num_outputs)])
    assert inputs == declared(entries["inputs"])
    assert outputs == declared(entries["outputs"])


def test_an_engine_with_the_checkpoint_s_weights(folder: Path, model: Parsed) -> None:
    """The embedding is the weight to look for: a table of rows keeps its layout, projections are fused."""
    plan = model.build(profile_of(folder))
    assert model.log.errors == []
    assert plan is not None
    with safe_open(folder / "model-dense.safetensors", "pt") as weights:
        embedding = weights.get_tensor(EMBEDDING)
    stored = (embedding, embedding.float())  # as it lies, or after the graph's Cast
    assert any(table.view(torch.uint8).numpy().tobytes() in plan for table in stored)


def test_without_the_local_functions_every_node_of_ours_is_refused(folder: Path) -> None:
    """So it is the functions that were built: TensorRT has nothing of its own for these nodes."""
    bare = graph_of(folder)
    del bare.functions[:]
    found = parsed(bare, folder)
    assert not found.accepted
    ours = {node.name for node in bare.graph.node if node.domain == DOMAIN}
    assert {refusal.node_name() for refusal in found.refusals()} == ours


@pytest.mark.parametrize("topk", [MOST_KEYS, MOST_KEYS + 1])
def test_the_most_keys_an_indexer_can_select(topk: int) -> None:
    inputs = {
        "q": torch.zeros(1, 1, 4, 16), "k": torch.zeros(1, 5000, 16), "weights": torch.zeros(1, 1, 4),
        "key_begin": torch.zeros(1, 1, dtype=torch.int64), "key_end": torch.zeros(1, 1, dtype=torch.int64),
    }  # fmt: skip
    indexer = parsed(node_model("LightningIndexer", inputs, topk=topk))
    assert indexer.accepted
    sizes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    plan = indexer.build({name: (size, size, size) for name, size in sizes.items()})
    if topk <= MOST_KEYS:
        assert plan
    else:
        assert plan is None
        assert any(f"K exceeds the maximum value allowed ({MOST_KEYS})" in error for error in indexer.log.errors)
