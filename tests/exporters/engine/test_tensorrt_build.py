"""Engines of TensorRT-RTX, whose builder needs no GPU: every DSA op of every layer is a plugin, and the plan has its binaries.

An engine is built, not run: to deserialise one TensorRT asks for a driver.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
from checkpoints import dense_checkpoint
from command_line import assert_refused, mla2dsa
from deploy_tools import check, compiled_tools
from dsa_checkpoints import NAMES, dsa_checkpoint
from plugin_readers import read_bundle
from rtx import tensorrt_rtx
from stacks import attention_stack

from mla2dsa.compat.tensorrt_backend import load_plugins, open_backend
from mla2dsa.errors import UserError
from mla2dsa.exporters.engine.engine_plan import EnginePlan
from mla2dsa.exporters.engine.layers import Layer, check_plugin_layers
from mla2dsa.exporters.engine.plugin_build import build_plugin
from mla2dsa.exporters.engine.plugin_fields import attach
from mla2dsa.exporters.engine.to_tensorrt import build_engine
from mla2dsa.files.manifests.engine_manifest import ENGINE_MANIFEST
from mla2dsa.kernels.op_spec import NODES
from mla2dsa.optimizer.export import export

tensorrt_rtx()
pytest.importorskip("triton")
SMS = "80,89"
SIZES = ("--max", "batch=2,seq=64,cache_length=128", "--min", "cache_length=16")


@pytest.fixture(scope="module", params=NAMES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export for TensorRT: the example in bfloat16, and a mixture of experts in float32."""
    checkpoint = dsa_checkpoint(request.param, tmp_path_factory)
    dtype = "bfloat16" if request.param == "tiny-mla" else "float32"
    out = tmp_path_factory.mktemp("trt") / request.param
    return export(checkpoint, out, dtype=dtype, max_batch=2, max_seq=128).folder


@pytest.fixture(scope="module")
def built(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "engine"
    done = mla2dsa(
        "build", exported, out, "--backend", "tensorrt-rtx", "--sm", SMS, *SIZES, "--no-engine-cache", "--jobs", 1
    )
    assert done.code == 0, done.err
    assert "engine cache: miss" in done.out
    return out


def manifest(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / ENGINE_MANIFEST).read_text())
    assert isinstance(found, dict)
    return found


def layers(folder: Path) -> list[dict[str, Any]]:
    found = json.loads((folder / "layers.json").read_text())
    assert isinstance(found, list)
    return found


def test_every_op_of_every_layer_is_a_plugin_layer(exported: Path, built: Path) -> None:
    graph = onnx.load(str(exported / "model.onnx"), load_external_data=False).graph
    ours = {node.name for node in graph.node if node.op_type in NODES}
    depth = json.loads((exported / "config.json").read_text())["num_hidden_layers"]
    assert len(ours) == 4 * depth
    plugins = [layer for layer in layers(built) if layer["type"] in ("PluginV3", "custom_layer")]
    for profile in (0, 1):
        found = [name for layer in plugins if layer["profile"] == profile for name in layer["onnx"]]
        assert sorted(found) == sorted(ours)
    assert manifest(built)["layers"] == {"total": len(layers(built)), "plugin": 2 * len(ours)}
    assert {op: facts["nodes"] for op, facts in manifest(built)["ops"].items()} == {
        "CacheWrite": 2 * depth, "LightningIndexer": depth, "SparseMLA": depth,
    }  # fmt: skip


def test_the_plan_holds_the_binaries_and_the_programs(built: Path) -> None:
    plan = (built / "model.engine").read_bytes()
    files = sorted((built / "plugins").glob("*.kernels"))
    assert len(files) >= 4
    for file in files:
        kernels = read_bundle(file.read_bytes())
        assert {sm for kernel in kernels.values() for sm in kernel.binaries} == {80, 89}
        assert all(binary.cubin in plan for kernel in kernels.values() for binary in kernel.binaries.values())
        assert file.with_suffix(".program").read_bytes() in plan


def test_the_folder_is_all_it_takes(exported: Path, built: Path) -> None:
    known = manifest(built)
    assert known["backend"]["name"] == "tensorrt-rtx"
    assert known["sms"] == [80, 89]
    assert [profile["name"] for profile in known["profiles"]] == ["prefill", "decode"]
    assert known["profiles"][0]["seq"] == [1, 64, 64]
    assert known["profiles"][1]["seq"] == [1, 1, 1]
    assert (
        known["source"]["fingerprint"]
        == json.loads((exported / "mla2dsa-export.json").read_text())["source"]["fingerprint"]
    )
    assert (built / known["plugin"]["file"]).is_file()
    names = {file.name for file in built.iterdir()}
    assert {"config.json", "model.engine", "layers.json", "plugins", ENGINE_MANIFEST} <= names
    assert not any(name.endswith(".safetensors") for name in names)


def test_a_process_without_python_uses_the_folder(built: Path, tmp_path: Path) -> None:
    """examples/deploy/check_folder, in C++: every plugin is made from the folder's files and launches its kernels."""
    tools = compiled_tools(tmp_path)
    done = check(tools, built, MOCK_SM="80", MOCK_LAUNCHES=str(tmp_path / "launches"))
    assert (done.returncode, done.stderr) == (0, "")
    count = len(list((built / "plugins").glob("*.program")))
    assert done.stdout.splitlines()[-1] == f"{count} plugins ok on sm_80"
    launched = (tmp_path / "launches").read_text()
    for kernel in ("indexer_decode", "indexer_prefill", "topk_row", "sparse_mla", "combine", "cache_write"):
        assert kernel in launched


def test_the_layer_list_is_the_same_again(exported: Path, built: Path, tmp_path: Path) -> None:
    options = ("--backend", "tensorrt-rtx", "--sm", SMS, *SIZES, "--no-engine-cache", "--jobs", 1)
    assert mla2dsa("build", exported, tmp_path / "again", *options).code == 0
    once, again = layers(built), layers(tmp_path / "again")
    assert Counter(map(_kind, again)) == Counter(map(_kind, once))
    assert sorted(filter(None, map(_own, again))) == sorted(filter(None, map(_own, once)))


def _kind(layer: dict[str, Any]) -> tuple[str, int]:
    return layer["type"], layer["profile"]


def _own(layer: dict[str, Any]) -> str | None:
    """Without those that TensorRT makes up inside of a loop: which of two equal sums it fuses with what is not always the same."""
    return None if "$$myelin$$" in layer["name"] else json.dumps([layer["onnx"], layer["type"], layer["profile"]])


@pytest.mark.parametrize("exported", ["moe"], indirect=True)
def test_the_plugin_may_be_inside_of_the_plan(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the cache: what is the same is found, what differs in one option is not, what is damaged is built again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLA2DSA_CACHE", raising=False)
    library = build_plugin().read_bytes()
    options = ("--backend", "tensorrt-rtx", "--sm", "80", *SIZES, "--jobs", 1)
    first = mla2dsa("build", exported, tmp_path / "one", *options, "--embed-plugin")
    assert "engine cache: miss" in first.out, first.err
    assert library in (tmp_path / "one" / "model.engine").read_bytes()
    assert manifest(tmp_path / "one")["plugin"]["embedded"]
    second = mla2dsa("build", exported, tmp_path / "two", *options, "--triton-repo")
    assert "engine cache: hit" in second.out, second.err
    same = (tmp_path / "two" / "triton" / "two" / "1" / "model.plan").read_bytes()
    assert same == (tmp_path / "one" / "model.engine").read_bytes()
    (kept,) = (tmp_path / "cache" / "mla2dsa" / "engines").iterdir()
    damaged = (kept / "model.engine").read_bytes()[:-1]
    (kept / "model.engine").unlink()
    (kept / "model.engine").write_bytes(damaged)
    third = mla2dsa("build", exported, tmp_path / "three", *options, "--embed-plugin")
    assert "engine cache: damaged, built again: " in third.out, third.err
    assert (tmp_path / "three" / "model.engine").stat().st_size > len(damaged)


def test_a_stack_of_61_layers_of_real_width() -> None:
    """DeepSeek-V3's attention: 128 heads, latents of 576, 64 index heads of 128, top-k 2048."""
    plugins, seconds = stack_plugins(61)
    assert seconds < 60
    assert len(plugins) == 2 * 61 * 4


def test_layers_that_share_a_selection() -> None:
    """GLM-5.2: one of them is a cache of latents and an attention, which reads the indices of a layer before it."""
    plugins, _ = stack_plugins(3, shared=(1, 2))
    full = ["CacheWrite_latent", "CacheWrite_index_key", "LightningIndexer", "SparseMLA"]
    names = [f"layers.{layer}/{name}" for layer in range(3) for name in (full if layer == 0 else full[::3])]
    assert sorted(plugins) == sorted(2 * names)


def stack_plugins(layers: int, shared: tuple[int, ...] = ()) -> tuple[list[str], float]:
    """(ONNX names of the plugin layers of an engine with two profiles, seconds to build it)."""
    model, inputs = attention_stack(layers, shared)
    nodes = attach(model, (90,), 1)
    backend = open_backend("tensorrt-rtx")
    profile = {"name": "prefill", "batch": [1, 1, 4], "seq": [1, 512, 512], "cache_length": [256, 4096, 131072]}
    started = time.monotonic()
    plan = build_engine(
        backend, model, Path(), inputs, nodes, build_plugin(), EnginePlan([profile, {**profile, "seq": [1, 1, 1]}], ())
    )
    return [name for layer in plan.layers if layer.is_plugin for name in layer.onnx], time.monotonic() - started


def test_a_model_for_trtexec(exported: Path, tmp_path: Path) -> None:
    """Needs neither TensorRT nor a GPU; what it writes is all that a parser with the plugin needs."""
    out = tmp_path / "onnx"
    done = mla2dsa("build", exported, out, "--onnx-only", "--sm", "90", "--jobs", 1, *SIZES, "--json")
    assert done.code == 0, done.err
    build, prefill, decode = done.json()["commands"]
    assert f"--dynamicPlugins={out / 'libmla2dsa_trt.so'}" in build
    assert [option for option in build if option.startswith("--profile=")] == ["--profile=0", "--profile=1"]
    inputs = json.loads((exported / "mla2dsa-export.json").read_text())["inputs"]
    shapes = next(option for option in build if option.startswith("--maxShapes=")).removeprefix("--maxShapes=")
    assert [shape.split(":")[0] for shape in shapes.split(",")] == [entry["name"] for entry in inputs]
    assert "input_ids:2x64" in shapes.split(",")
    assert "--useProfile=0" in prefill
    assert any("input_ids:1x1," in option for option in decode)
    backend = open_backend("tensorrt-rtx")
    load_plugins(backend, out / "libmla2dsa_trt.so", NODES)
    network = backend.network(backend.trt.Builder(backend.logger()))
    parser = backend.trt.OnnxParser(network, backend.logger())
    assert parser.parse((out / "model.onnx").read_bytes(), str(out / "model.onnx"))


def test_without_its_fields_a_node_is_refused(exported: Path) -> None:
    """So there is nothing that TensorRT could fall back on."""
    backend = open_backend("tensorrt-rtx")
    model = onnx.load(str(exported / "model.onnx"), load_external_data=False)
    nodes = attach(model, (80,), 1)
    node = next(node for node in model.graph.node if node.op_type == "SparseMLA")
    kept = [attribute for attribute in node.attribute if attribute.name != "program"]
    del node.attribute[:]
    node.attribute.extend(kept)
    inputs = json.loads((exported / "mla2dsa-export.json").read_text())["inputs"]
    with pytest.raises(UserError, match=rf"tensorrt-rtx does not take the model: {node.name}.*field program"):
        build_engine(backend, model, exported, inputs, nodes, build_plugin(), EnginePlan([], ()))


def test_a_node_that_is_no_plugin_layer_fails_the_build() -> None:
    from mla2dsa.exporters.engine.plugin_fields import PluginNode

    nodes = [PluginNode(name, "SparseMLA", "", "", "") for name in ("a/SparseMLA", "b/SparseMLA")]
    good = [Layer(f"{node.name} [profile {p}]", "custom_layer", (node.name,), p) for node in nodes for p in (0, 1)]
    check_plugin_layers(nodes, good, 2)
    with pytest.raises(UserError, match=r"b/SparseMLA is no plugin layer in profile 1 of the engine"):
        check_plugin_layers(nodes, good[:-1], 2)
    gemm = Layer("b/SparseMLA", "gemm", ("b/SparseMLA",), 1)
    with pytest.raises(UserError, match=r"b/SparseMLA is no plugin layer in profile 1"):
        check_plugin_layers(nodes, [*good[:-1], gemm], 2)
    with pytest.raises(UserError, match=r"a/SparseMLA and 1 more is no plugin layer in profile 0"):
        check_plugin_layers(nodes, [gemm, Layer("x", "gemm", ("x",), 0)], 2)
    with pytest.raises(UserError, match="did not say which layers"):
        check_plugin_layers(nodes, [], 2)


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (("--backend", "tensorrt-rtx", "--sm", "90"), 2, ["TensorRT-RTX has no engines for sm_90", "use --backend tensorrt"]),
        (("--backend", "tensorrt-rtx", "--sm", "75"), 2, ["sm_75 is not supported"]),
        (("--backend", "tensorrt-rtx", "--sm", "x"), 2, ["--sm x: expected numbers"]),
        (("--backend", "tensorrt-rtx", "--jobs", "0"), 2, ["--jobs 0: expected 1 or more"]),
        (("--backend", "tensorrt-rtx", "--max", "tokens=3"), 2, ["--max tokens=3: expected batch=N,seq=N,cache_length=N"]),
        (("--backend", "tensorrt-rtx", "--max", "batch=3"), 2, ["--max batch=3 is over the 2 of the export"]),
        (("--backend", "tensorrt-rtx", "--min", "seq=100", "--max", "seq=50"), 2, ["seq: 100 <=", "are not in order"]),
        (("--backend", "tensorrt-rtx", "--max", "seq=64,cache_length=32"), 2, ["--max seq=64 is more than a cache of 32"]),
        (("--backend", "tensorrt-rtx", "--dtype", "int8"), 2, ["dtype 'int8'"]),
        (("--backend", "cuda"), 2, ["cuda"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_wrong_usage(exported: Path, tmp_path: Path, options: tuple[str, ...], code: int, parts: list[str]) -> None:
    assert_refused(mla2dsa("build", exported, tmp_path / "out", *options), code, *parts)
    assert not (tmp_path / "out").exists()


def test_a_dense_checkpoint_is_sent_to_deploy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    dense = dense_checkpoint("moe", tmp_path_factory)
    done = mla2dsa("build", dense, tmp_path / "out", "--backend", "tensorrt-rtx", "--sm", "80")
    assert_refused(done, 1, dense, "a dense checkpoint", "mla2dsa deploy")


def test_an_onnx_file_is_its_folder(exported: Path, tmp_path: Path) -> None:
    options = ("--backend", "tensorrt-rtx", "--dry-run", "--json")
    planned = mla2dsa("build", exported / "model.onnx", tmp_path / "out", *options).json()
    assert planned == mla2dsa("build", exported, tmp_path / "out", *options).json()
    (tmp_path / "other.onnx").write_bytes(b"")
    done = mla2dsa("build", tmp_path / "other.onnx", tmp_path / "out", *options)
    assert_refused(done, 1, tmp_path / "other.onnx", "no export of mla2dsa")


def test_a_folder_in_use_is_left_alone(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = mla2dsa("build", exported, tmp_path, "--backend", "tensorrt-rtx", "--sm", "80")
    assert_refused(done, 2, tmp_path, "not empty")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_dry_run_writes_nothing(exported: Path, tmp_path: Path) -> None:
    done = mla2dsa(
        "build", exported, tmp_path / "out", "--backend", "tensorrt-rtx", "--dry-run", "--json", "--max", "seq=9"
    )
    found = done.json()
    assert found["sms"] == [80, 86, 89, 120]
    assert found["profiles"][0]["seq"] == [1, 9, 9]
    assert not (tmp_path / "out").exists()


def test_tensorrt_rtx_has_to_be_loaded_by_us() -> None:
    """Imported before, it would end the process where a node is a plugin: refused in one line instead."""
    script = (
        "import tensorrt_rtx; from mla2dsa.compat.tensorrt_backend import open_backend; open_backend('tensorrt-rtx')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "UserError: tensorrt_rtx was imported before mla2dsa" in done.stderr


def test_engines_need_a_gpu_to_run(built: Path) -> None:
    for command in (("generate", built, "hello"), ("bench", built / "model.engine")):
        assert_refused(mla2dsa(*command), 1, built, "an engine runs on an NVIDIA GPU")
    assert_refused(
        mla2dsa("generate", built, "hello", "--runtime", "torch"), 1, "an engine folder, which torch cannot run"
    )
    found = mla2dsa("inspect", built, "--json").json()
    assert (found["kind"], found["sms"]) == ("engine", [80, 89])
