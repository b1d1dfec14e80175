"""What surrounds an engine: sizes, layer lists, the manifest and its checks, opening it, deploy and bench."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import assert_refused, mla2dsa, small_conversion
from fake_tensorrt import FakeEngine
from manifests import engine_manifest
from places import TINY
from rtx import tensorrt_rtx

from mla2dsa.compat import tensorrt_backend
from mla2dsa.compat.tensorrt_backend import Backend, open_backend
from mla2dsa.errors import UsageError, UserError
from mla2dsa.exporters.engine import to_tensorrt
from mla2dsa.exporters.engine.layers import Layer, layers_from_inspector, layers_from_log
from mla2dsa.exporters.engine.profiles import engine_profiles, read_sizes, shape_of
from mla2dsa.files.manifests.engine_manifest import (
    ENGINE_MANIFEST,
    check_engine,
    engine_folder,
    read_engine,
    read_plan,
    read_plugin,
)
from mla2dsa.files.manifests.export_manifest import EXPORT_MANIFEST
from mla2dsa.optimizer import deploy
from mla2dsa.optimizer.answers.timing import measure
from mla2dsa.optimizer.export import export
from mla2dsa.runtime.tensorrt_session import TensorRtSession, deserialised, open_engine_session

LIMITS = {"max_batch": 4, "max_seq": 8192}


@pytest.mark.parametrize(
    ("least", "usual", "most", "prefill"),
    [
        ({}, {}, {}, [[1, 1, 4], [1, 512, 512], [256, 4096, 8192]]),
        ({}, {}, {"batch": 2, "seq": 128}, [[1, 1, 2], [1, 128, 128], [256, 4096, 8192]]),
        ({"cache_length": 1024}, {"batch": 2}, {"cache_length": 2048}, [[1, 2, 4], [1, 512, 512], [1024, 2048, 2048]]),
        ({"seq": 16}, {"seq": 32}, {"seq": 64}, [[1, 1, 4], [16, 32, 64], [256, 4096, 8192]]),
    ],
)
def test_profiles(least: dict[str, int], usual: dict[str, int], most: dict[str, int], prefill: list[list[int]]) -> None:
    found = engine_profiles(LIMITS, least, usual, most)
    assert [[profile[dim] for dim in ("batch", "seq", "cache_length")] for profile in found] == [
        prefill, [prefill[0], [1, 1, 1], prefill[2]],
    ]  # fmt: skip
    assert [profile["name"] for profile in found] == ["prefill", "decode"]


def test_a_short_context_makes_small_profiles() -> None:
    prefill, _ = engine_profiles({"max_batch": 1, "max_seq": 100}, {}, {}, {})
    assert (prefill["seq"], prefill["cache_length"]) == ([1, 100, 100], [100, 100, 100])


def test_shapes_of_a_profile() -> None:
    prefill, decode = engine_profiles(LIMITS, {}, {}, {})
    entry = {"name": "past_latent_0", "shape": ["batch", "cache_length", 576]}
    assert [shape_of(entry, prefill, which) for which in range(3)] == [(1, 256, 576), (1, 4096, 576), (4, 8192, 576)]
    assert shape_of({"shape": ["batch", "seq"]}, decode, 2) == (4, 1)


@pytest.mark.parametrize(
    "text", ["batch", "batch=", "batch=0", "batch=-1", "rows=3", "batch=1,batch=2", "batch=1;seq=2"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--max .*: expected batch=N,seq=N,cache_length=N"):
        read_sizes("--max", text)


def test_sizes() -> None:
    assert read_sizes("--min", "batch=2, cache_length=64") == {"batch": 2, "cache_length": 64}
    assert read_sizes("--min", None) == {}


LOG = """Layers:
Name: layers.0/SparseMLA_myl4_17, LayerType: custom_layer, Inputs: [], Outputs: [], TacticName: x, StreamId: 0, Metadata:
Name: layers.0/CacheWrite_0 [profile 1], LayerType: PluginV3, Inputs: [], Metadata: [ONNX Layer: layers.0/CacheWrite_0 [profile 1]]
Name: fused, LayerType: gemm, Inputs: [], Metadata: [ONNX Layer: a]\x1e[ONNX Layer: b]
not a layer
"""


def test_layers_of_a_log() -> None:
    assert layers_from_log(LOG) == [
        Layer("layers.0/SparseMLA_myl4_17", "custom_layer", ("layers.0/SparseMLA",), 0),
        Layer("layers.0/CacheWrite_0 [profile 1]", "PluginV3", ("layers.0/CacheWrite_0",), 1),
        Layer("fused", "gemm", ("a", "b"), 0),
    ]
    assert layers_from_log("Layers:\n") == []


def test_layers_of_an_inspector() -> None:
    """Written by hand from the documentation of IEngineInspector."""
    text = json.dumps(
        {
            "Layers": [
                {"Name": "layers.0/SparseMLA", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: layers.0/SparseMLA]"},
                {"Name": "gemm_1", "LayerType": "gemm"},
            ]
        }
    )
    assert [(it.onnx, it.is_plugin) for it in layers_from_inspector(text)] == [
        (("layers.0/SparseMLA",), True),
        (("gemm_1",), False),
    ]
    with pytest.raises(UserError, match=r"without ProfilingVerbosity.DETAILED"):
        layers_from_inspector('{"Layers": ["layers.0/SparseMLA"]}')


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A folder with files of the right names, and a manifest that is true of them."""
    (tmp_path / "model.engine").write_bytes(b"plan")
    (tmp_path / "libmla2dsa_trt.so").write_bytes(b"library")
    manifest = engine_manifest(tmp_path, "tensorrt", "10.16.1", [90, 100])
    (tmp_path / ENGINE_MANIFEST).write_text(json.dumps(manifest))
    return tmp_path


def test_an_engine_folder_is_known_by_its_manifest(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert engine_folder(engine) == engine_folder(engine / "model.engine") == engine
    assert engine_folder(tmp_path_factory.mktemp("other")) is None
    check_engine(engine, read_engine(engine), "10.16.1", 90)
    check_engine(engine, read_engine(engine), "10.16.1", None)


@pytest.mark.parametrize(
    ("version", "sm", "message"),
    [
        ("11.4.0", 90, "built with tensorrt 10.16.1, installed is 11.4.0"),
        ("10.16.1", 80, "built for sm_90, sm_100; this GPU is sm_80: build again with --sm 80"),
    ],
)
def test_an_engine_that_cannot_run_here(engine: Path, version: str, sm: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_engine(engine, read_engine(engine), version, sm)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.engine", None, "model.engine: missing, it is the engine"),
        ("model.engine", b"plam", "model.engine: not the engine that was built"),
        ("model.engine", b"plan+", "model.engine: not the engine that was built"),
        ("libmla2dsa_trt.so", b"Library", "libmla2dsa_trt.so: not the plugin library that was built"),
    ],
)
def test_a_folder_with_other_files(engine: Path, file: str, content: bytes | None, message: str) -> None:
    (engine / file).unlink()
    if content is not None:
        (engine / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        {"model.engine": read_plan, "libmla2dsa_trt.so": read_plugin}[file](engine, read_engine(engine))


def test_a_manifest_of_another_format(engine: Path) -> None:
    manifest = json.loads((engine / ENGINE_MANIFEST).read_text())
    (engine / ENGINE_MANIFEST).write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(UserError, match="format 2, this mla2dsa reads 1; build the engine again"):
        read_engine(engine)


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    open_backend.cache_clear()
    monkeypatch.setattr(tensorrt_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"tensorrt is not installed: pip install 'mla2dsa\[tensorrt\]', or pass --backend tensorrt-rtx"
    ):
        open_backend("tensorrt")
    with pytest.raises(UsageError, match="backend 'trt': expected one of tensorrt, tensorrt-rtx"):
        open_backend("trt")


def test_a_tensorrt_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    open_backend.cache_clear()
    monkeypatch.setattr(tensorrt_backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tensorrt_backend.importlib, "import_module", lambda name: SimpleNamespace(__version__="10.2.0"))
    with pytest.raises(UserError, match=r"TensorRT 10.2.0 is too old, expected 10.3 or newer"):
        open_backend("tensorrt")
    open_backend.cache_clear()


class _Runtime:
    """TensorRT's Runtime, as far as opening an engine goes."""

    engine: Any = None
    made: list[_Runtime] = []  # noqa: RUF012

    def __init__(self, log: Any) -> None:
        self.log, self.engine_host_code_allowed = log, False
        _Runtime.made.append(self)

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        if _Runtime.engine is None:
            self.log.errors.append("the version of the plan\n does not match")
        return _Runtime.engine


@pytest.mark.parametrize("embedded", [False, True])
def test_opening_an_engine(engine: Path, embedded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plugin inside, host code is allowed; else our library is loaded."""
    loaded: list[tuple[Path, bytes, int]] = []

    def load(backend: Backend, file: Path, plugins: object) -> None:
        loaded.append((file, file.read_bytes(), file.parent.parent.stat().st_mode & 0o077))

    monkeypatch.setattr("mla2dsa.runtime.tensorrt_session.load_plugins", load)
    monkeypatch.setattr(Backend, "logger", lambda self: SimpleNamespace(errors=[]))
    backend = Backend("tensorrt", SimpleNamespace(Runtime=_Runtime), "10.16.1")
    manifest = read_engine(engine)
    manifest["plugin"]["embedded"] = embedded
    monkeypatch.setattr(_Runtime, "engine", "an engine")
    assert deserialised(backend, engine, manifest) == "an engine"
    assert _Runtime.made[-1].engine_host_code_allowed is embedded
    assert [(file.name, *rest) for file, *rest in loaded] == (
        [] if embedded else [("libmla2dsa_trt.so", b"library", 0)]
    )
    assert not any(file.is_relative_to(engine) for file, *_ in loaded)  # a private copy of the bytes that were checked
    monkeypatch.setattr(_Runtime, "engine", None)
    with pytest.raises(
        UserError, match=r"tensorrt 10.16.1 cannot load the engine: the version of the plan does not match"
    ):
        deserialised(backend, engine, manifest)


@pytest.mark.parametrize("embedded", [False, True])
def test_a_finished_engine_is_asked_for_its_layers(embedded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the builder's log does not list them. A plan with the plugin inside is only loaded with host code allowed."""
    layer = {"Name": "a", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: a]"}
    inspector = SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": [layer]}))
    monkeypatch.setattr(_Runtime, "engine", SimpleNamespace(create_engine_inspector=lambda: inspector))
    trt = SimpleNamespace(Runtime=_Runtime, LayerInformationFormat=SimpleNamespace(JSON=1))
    log = SimpleNamespace(errors=[])
    (found,) = to_tensorrt._inspected(Backend("tensorrt", trt, "10.16.1"), log, b"plan", embedded)
    assert found.is_plugin
    assert _Runtime.made[-1].engine_host_code_allowed is embedded


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu_to_build_for(checkpoint: Path, tmp_path: Path) -> None:
    done = mla2dsa("build", checkpoint, tmp_path / "out", "--onnx-only")
    assert_refused(done, 1, "no GPU here to build for", "--sm", "--backend tensorrt-rtx")


def test_tensorrt_rtx_opens_again() -> None:
    """Its libraries are put in place once a process; asking for the backend anew is no second import."""
    first = tensorrt_rtx()
    open_backend.cache_clear()
    assert tensorrt_rtx() is first


def test_without_a_gpu_nothing_is_opened(engine: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"an engine runs on an NVIDIA GPU, and torch sees none here"):
        open_engine_session(engine, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_conversion(tmp_path_factory)


def test_bench_on_the_stand_in(checkpoint: Path, tmp_path: Path) -> None:
    folder = export(checkpoint, tmp_path / "onnx", max_batch=2, max_seq=128).folder
    manifest = json.loads((folder / EXPORT_MANIFEST).read_text())
    manifest["profiles"] = engine_profiles({"max_batch": 2, "max_seq": 128}, {}, {}, {})
    session = TensorRtSession(FakeEngine(folder, manifest), manifest, 2, device="cpu")
    found = measure(session, 1024, context=40, tokens=4)
    assert (found["batch"], found["context"]) == (2, 40)
    assert found["prefill_tokens_per_second"] == pytest.approx(80 / found["prefill_seconds"])
    assert 0 < found["decode_ms"]["p50"] <= found["decode_ms"]["p90"] <= found["decode_ms"]["p99"]
    assert found["decode_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("bench", "{}", "--tokens", "0"), 2, ["--tokens 0: expected 1 to"]),
        (
            ("bench", "/no/such/engine", "--runtime", "tensorrt"),
            1,
            ["/no/such/engine", "no engine folder", "mla2dsa build"],
        ),
        (("generate", "/no/such/engine", "x", "--runtime", "tensorrt"), 1, ["no engine folder"]),
    ],
    ids=["tokens", "bench", "generate"],
)
def test_refusals(engine: Path, arguments: tuple[str, ...], code: int, parts: list[str]) -> None:
    assert_refused(mla2dsa(*(it.format(engine) for it in arguments)), code, *parts)


def test_deploy_says_what_will_fail_before_it_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion may take hours."""
    dense = TINY
    monkeypatch.setattr(deploy, "convert", lambda *_, **__: pytest.fail("it was converted"))
    rtx = ("--backend", "tensorrt-rtx", "--sm")
    for options, code, part in (
        ((*rtx, "90"), 2, "TensorRT-RTX has no engines for sm_90"),
        ((*rtx, "80", "--max", "seq=4,cache_length=2"), 2, "--max seq=4 is over the 2"),
        (("--sm", "80"), 1, "tensorrt is not installed"),
    ):
        if code == 1 and importlib.util.find_spec("tensorrt") is not None:
            continue
        assert_refused(mla2dsa("deploy", dense, tmp_path / "out", "--index-topk", 64, *options), code, part)
    assert list(tmp_path.iterdir()) == []


def test_deploy_does_all_of_it(checkpoint: Path, tmp_path: Path) -> None:
    """From the dense example to an engine folder; and the plan of it, which writes nothing."""
    tensorrt_rtx()
    pytest.importorskip("triton")
    dense = TINY
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sequence_length: 128\ntokens: 512\nrows: 32\nverify: {sequences: 1}\n")
    options = (
        "--recipe",
        recipe,
        "--index-topk",
        32,
        "--backend",
        "tensorrt-rtx",
        "--sm",
        "80",
        "--max",
        "cache_length=256,seq=64",
    )
    planned = mla2dsa("deploy", dense, tmp_path / "out", *options, "--dry-run", "--json").json()
    assert planned["sms"] == [80]
    assert planned["conversion"]
    assert not (tmp_path / "out").exists()
    done = mla2dsa(
        "deploy",
        dense,
        tmp_path / "out",
        *options,
        "--keep-checkpoint",
        tmp_path / "dsa",
        "--skip-transformers",
        "--json",
    )
    assert done.code == 0, done.err
    assert done.json()["ops"]["SparseMLA"]["nodes"] == 4
    assert (tmp_path / "dsa" / "config.json").is_file()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    again = mla2dsa("deploy", tmp_path / "dsa", tmp_path / "again", *options, "--json")
    assert again.json()["engine"] == done.json()["engine"]
