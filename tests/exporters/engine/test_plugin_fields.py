"""Exported models with the plugin's fields attached: every DSA node has them, and nothing is left to fall back on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
from dsa_checkpoints import NAMES, dsa_checkpoint
from plugin_readers import read_bundle

from mla2dsa.errors import UserError
from mla2dsa.exporters.engine.plugin_fields import KERNELS, PROGRAM, attach
from mla2dsa.exporters.onnx_model.nodes import DOMAIN
from mla2dsa.kernels.op_spec import NODES
from mla2dsa.optimizer.export import export

pytest.importorskip("triton")


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    checkpoint = dsa_checkpoint(request.param, tmp_path_factory)
    out = tmp_path_factory.mktemp("fields") / request.param
    return graph_of(export(checkpoint, out, dtype="bfloat16").folder)


def graph_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(str(folder / "model.onnx"), load_external_data=False)


def ours(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in NODES]


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def field(node: onnx.NodeProto, name: str) -> bytes:
    return next(bytes(attribute.s) for attribute in node.attribute if attribute.name == name)


def test_every_node_gets_its_fields(model: onnx.ModelProto) -> None:
    attached = copy_of(model)
    steps: list[tuple[int, int]] = []
    found = attach(attached, (80, 90), on_progress=lambda done, total: steps.append((done, total)))
    nodes = ours(attached)
    assert [node.name for node in found] == [node.name for node in nodes]
    layers = Counter(node.layer for node in found)
    assert set(layers.values()) == {4}  # an indexer, an attention, two caches
    assert steps[-1] == (len(steps), len(steps))
    for node in nodes:
        program, bundle = field(node, PROGRAM).decode(), read_bundle(field(node, KERNELS))
        assert program.splitlines()[1] == f"op {node.op_type}"
        launched = {line.split()[1] for line in program.splitlines() if line.startswith("launch ")}
        assert launched == set(bundle)
        assert {sm for kernel in bundle.values() for sm in kernel.binaries} == {80, 90}


def test_the_local_functions_of_plugins_are_gone_and_no_other(model: onnx.ModelProto) -> None:
    attached = copy_of(model)
    attach(attached, (80,))
    before = {function.name for function in model.functions}
    assert before >= set(NODES)
    assert {function.name for function in attached.functions} == before - set(NODES)


def test_attaching_twice_gives_the_same(model: onnx.ModelProto) -> None:
    once = copy_of(model)
    first = attach(once, (80,))
    twice = copy_of(once)
    assert attach(twice, (80,)) == first
    assert twice.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)


def test_a_model_without_our_nodes_is_refused(model: onnx.ModelProto) -> None:
    bare = copy_of(model)
    kept = [node for node in bare.graph.node if node.domain != DOMAIN]
    del bare.graph.node[:]
    bare.graph.node.extend(kept)
    with pytest.raises(UserError, match="no node LightningIndexer, SparseMLA, CacheWrite of domain mla2dsa"):
        attach(bare, (80,))


def test_a_value_of_unknown_type_is_named(model: onnx.ModelProto) -> None:
    bare = copy_of(model)
    del bare.graph.value_info[:]
    with pytest.raises(UserError, match=r"Cache.*: the model does not say type and shape of .*; export it again"):
        attach(bare, (80,))
