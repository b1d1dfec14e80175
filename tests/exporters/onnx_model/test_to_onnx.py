"""Exported models in onnxruntime's CPU provider, against the same cached program in torch; and what lies on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import edit_config, random_indexers, save_dense
from command_line import captured_once  # noqa: F401  (a fixture)
from comparing import close
from onnx_session import external_tensors, numpy_type, session, with_data
from places import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.exporters.onnx_model.external_data import DATA_FILE, Placement, Stored
from mla2dsa.exporters.onnx_model.to_onnx import LAYER
from mla2dsa.files.manifests.export_manifest import EXPORT_MANIFEST
from mla2dsa.files.safetensors_index import TensorLocation
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.export import Exported, export
from mla2dsa.optimizer.model.cached_model import CachedModel, open_cached
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.proof.streamed_model import StreamedModel
from mla2dsa.optimizer.proof.transformers_check import logits
from mla2dsa.optimizer.recipe import Recipe
from mla2dsa.runtime.execute import PieceRunner

pytestmark = pytest.mark.usefixtures("captured_once")
INDEXER = IndexerConfig(index_topk=16, index_n_heads=16, index_head_dim=32)  # 16 heads: exact ties at zero are rare
CAPACITY = 96
# name: fields of the dense model. In "moe-torn" a layer's experts lie in several files, gate, up and down apart.
MADE: dict[str, dict[str, Any]] = {
    "moe": {"first_k_dense_replace": 1},
    "moe-torn": {
        "first_k_dense_replace": 1, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "max_shard_size": "100KB",
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """DSA checkpoints by name: tiny-mla converted as a user would, and random models with indexers."""
    from mla2dsa.optimizer.convert import convert

    place = tmp_path_factory.mktemp("dsa")
    recipe = Recipe(index_topk=64, sequence_length=128, tokens=512, rows=32)
    convert(str(TINY), place / "tiny", recipe, skip_verification=True)
    made = {"tiny": place / "tiny"}
    for name, fields in MADE.items():
        save_dense(place / f"{name}-source", num_hidden_layers=2, **fields)
        weights = random_indexers(place / f"{name}-source", INDEXER)
        made[name] = write_dsa_checkpoint(place / f"{name}-source", place / name, weights, INDEXER, manifest={})
    return made


@pytest.fixture(scope="module")
def exports(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    place = tmp_path_factory.mktemp("onnx")
    wanted = [(name, "float32") for name in checkpoints] + [("moe", "float16"), ("moe", "bfloat16")]
    return {
        f"{name}-{dtype}": export(checkpoints[name], place / f"{name}-{dtype}", dtype=dtype, max_batch=4)
        for name, dtype in wanted
    }


class Torch:
    """The cached program on the checkpoint's weights."""

    def __init__(self, folder: Path) -> None:
        self.ready: CachedModel = open_cached(Checkpoint.open(folder), torch.float32, last_only=True)
        program = self.ready.cached.program
        self._runner = PieceRunner(program, self.ready.source.loader(program))

    def step(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = next(self._runner.outputs_of([inputs]))
        return outputs


class Model:
    """An exported folder, driven by nothing but its manifest."""

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / EXPORT_MANIFEST).read_text())
        self._session = session(folder / self.manifest["file"])
        self._type = numpy_type(self.manifest["dtype"])

    def caches(self, batch: int) -> dict[str, Tensor]:
        kinds = [layer[kind] for layer in self.manifest["caches"] for kind in ("latent", "index_key")]
        return {kind["input"]: torch.zeros(batch, CAPACITY, kind["width"]) for kind in kinds}

    def step(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        feeds = {
            name: t.numpy().astype(self._type) if t.is_floating_point() else t.numpy() for name, t in inputs.items()
        }
        assert feeds.keys() == {entry["name"] for entry in self.manifest["inputs"]}
        return [torch.from_numpy(array.astype(np.float32)) for array in self._session.run(None, feeds)]


def chunk(ids: Tensor, slots: Tensor, begin: Tensor, last: list[int]) -> dict[str, Tensor]:
    positions = (slots - begin[:, None]).clamp_min(0)
    return {
        "input_ids": ids, "position_ids": positions, "slots": slots, "key_begin": begin, "last": torch.tensor(last),
    }  # fmt: skip


def scenario(name: str, vocab: int) -> list[dict[str, Tensor]]:
    """Calls in a row, without caches, of two sequences."""
    ids = torch.randint(0, vocab, (2, 80), generator=torch.Generator().manual_seed(3))
    none = torch.zeros(2, dtype=torch.int64)
    span = torch.arange(80).expand(2, -1)
    if name == "prefill":
        return [chunk(ids, span, none, [79, 79])]
    if name == "decode":
        return [chunk(ids[:, i : i + 1], span[:, i : i + 1], none, [0, 0]) for i in range(24)]
    if name == "chunks":
        cuts = [(0, 33), (33, 70), (70, 71), (71, 72), (72, 80)]
        return [chunk(ids[:, a:b], span[:, a:b], none, [b - a - 1] * 2) for a, b in cuts]
    if name == "left-padding":
        return [chunk(ids[:, :70], span[:, :70], torch.tensor([0, 31]), [69, 69])] + [
            chunk(ids[:, i : i + 1], span[:, i : i + 1], torch.tensor([0, 31]), [0, 0]) for i in range(70, 76)
        ]
    assert name == "ragged"  # 70 and 41 tokens, the shorter repeats its last; then each goes on at its own slot
    slots = torch.stack([torch.arange(70), torch.arange(70).clamp_max(40)])
    first = chunk(ids[:, :70].gather(1, slots), slots, none, [69, 40])
    steps = [chunk(ids[:, i : i + 1], torch.tensor([[70 + i], [41 + i]]), none, [0, 0]) for i in range(6)]
    return [first, *steps]


def differences(model: Model, torch_model: Torch, calls: list[dict[str, Tensor]]) -> list[float]:
    """Largest difference of the logits at each call; each side goes on with its own caches."""
    ours, theirs = model.caches(2), model.caches(2)
    names = [entry["name"] for entry in model.manifest["outputs"]]
    assert names[0] == "logits"
    found = []
    for inputs in calls:
        got, want = model.step({**inputs, **ours}), torch_model.step({**inputs, **theirs})
        found.append(float((got[0] - want[0]).abs().max()))
        ours, theirs = (
            {name.replace("present", "past"): value for name, value in zip(names[1:], values[1:], strict=True)}
            for values in (got, want)
        )
    return found


@pytest.fixture(scope="module")
def torch_models(checkpoints: dict[str, Path]) -> dict[str, Torch]:
    return {name: Torch(folder) for name, folder in checkpoints.items()}


@pytest.mark.parametrize("calls", ["prefill", "decode", "chunks", "left-padding", "ragged"])
@pytest.mark.parametrize("name", ["tiny", "moe", "moe-torn"])
def test_logits_equal_torch(
    name: str, calls: str, exports: dict[str, Exported], torch_models: dict[str, Torch]
) -> None:
    model = Model(exports[f"{name}-float32"].folder)
    vocab = model.manifest["model"]["vocab_size"]
    assert max(differences(model, torch_models[name], scenario(calls, vocab))) < 1e-4


@pytest.fixture(scope="module")
def transformers_models(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return {
        name: StreamedModel.of(Checkpoint.open(folder), "DeepseekV32ForCausalLM")
        for name, folder in checkpoints.items()
    }


@pytest.mark.parametrize("calls", ["prefill", "decode", "chunks", "left-padding", "ragged"])
@pytest.mark.parametrize("name", ["tiny", "moe"])
def test_logits_equal_transformers(
    name: str, calls: str, exports: dict[str, Exported], transformers_models: dict[str, Any]
) -> None:
    """At every call, the logits of transformers' DeepseekV32ForCausalLM without a cache on the real tokens so far."""
    model = Model(exports[f"{name}-float32"].folder)
    names = [entry["name"] for entry in model.manifest["outputs"]]
    caches, tokens = model.caches(2), torch.full((2, CAPACITY), -1)
    for inputs in scenario(calls, model.manifest["model"]["vocab_size"]):
        values = model.step({**inputs, **caches})
        caches = {n.replace("present", "past"): v for n, v in zip(names[1:], values[1:], strict=True)}
        tokens.scatter_(1, inputs["slots"], inputs["input_ids"])
        for row in range(2):
            begin, end = int(inputs["key_begin"][row]), int(inputs["slots"][row, inputs["last"][row]]) + 1
            want = logits(transformers_models[name], {"input_ids": tokens[row : row + 1, begin:end]}).rows(
                slice(-1, None)
            )[0]
            close(values[0][row, 0], want, atol=1e-4, name=f"row {row}")


def test_float16_runs_and_is_close(exports: dict[str, Exported], torch_models: dict[str, Torch]) -> None:
    """Below index_topk tokens, where rounding cannot change what is selected."""
    model = Model(exports["moe-float16"].folder)
    calls = scenario("decode", model.manifest["model"]["vocab_size"])[:12]
    assert max(differences(model, torch_models["moe"], calls)) < 0.05


ALL = ["tiny-float32", "moe-float32", "moe-torn-float32", "moe-float16", "moe-bfloat16"]


@pytest.mark.parametrize("name", ALL)
def test_full_checker(name: str, exports: dict[str, Exported]) -> None:
    onnx.checker.check_model(with_data(exports[name].folder), full_check=True)


@pytest.mark.parametrize("name", ALL)
def test_nodes_keep_their_layer(name: str, exports: dict[str, Exported]) -> None:
    """Of our nodes, all carry the layer and (but for MoE) the plugin namespace; of torch nothing is left."""
    done = exports[name]
    graph = onnx.load(str(done.folder / "model.onnx"), load_external_data=False).graph
    assert len({node.name for node in graph.node}) == len(graph.node)
    ours = [node for node in graph.node if node.domain == "mla2dsa"]
    layers = [cache["layer"] for cache in done.manifest["caches"]]
    for kind, count in (("LightningIndexer", 1), ("SparseMLA", 1), ("CacheWrite", 2)):
        found = [node.metadata_props[0].value for node in ours if node.op_type == kind]
        assert found == [layer for layer in layers for _ in range(count)]
    for node in ours:
        attributes = {a.name: a for a in node.attribute}
        assert node.op_type == "MoEExperts" or attributes["plugin_namespace"].s == b"mla2dsa"
        assert [entry.key for entry in node.metadata_props] == [LAYER]
    assert "pkg.torch" not in str(graph)


@pytest.mark.parametrize("name", ALL)
def test_manifest_tells_the_interface(name: str, exports: dict[str, Exported]) -> None:
    done = exports[name]
    graph = onnx.load(str(done.folder / "model.onnx"), load_external_data=False).graph
    element = {1: "float32", 10: "float16", 16: "bfloat16", 7: "int64"}
    for field, values in (("inputs", graph.input), ("outputs", graph.output)):
        told = [(entry["name"], entry["dtype"], entry["shape"]) for entry in done.manifest[field]]
        types = [(value.name, value.type.tensor_type) for value in values]
        assert told == [(n, element[t.elem_type], [d.dim_param or d.dim_value for d in t.shape.dim]) for n, t in types]
    assert ("onnxruntime-cpu" in done.manifest["runs_on"]) == (done.manifest["dtype"] != "bfloat16")
    assert done.manifest["limits"]["max_batch"] == 4
    assert done.manifest["source"]["fingerprint"] == Checkpoint.open(done_source(done)).fingerprint()


def done_source(done: Exported) -> Path:
    """The checkpoint an export was made from, by the name its manifest keeps."""
    return next(done.folder.parents[1].glob(f"dsa*/{done.manifest['source']['name']}"))


@pytest.mark.parametrize("name", ALL)
def test_no_weight_is_written(name: str, exports: dict[str, Exported], checkpoints: dict[str, Path]) -> None:
    """Every weight is bytes of the checkpoint's own files: same inode, and the bytes of the tensor of that name."""
    done = exports[name]
    assert done.manifest["weights"]["written_bytes"] == 0
    assert not (done.folder / DATA_FILE).exists()
    assert not [path for path in done.folder.rglob("*") if path.is_symlink()]
    source = Checkpoint.open(checkpoints[name.rpartition("-")[0]])
    for tensor, where in external_tensors(done.folder).items():
        assert (done.folder / where.location).stat().st_ino == (source.path / where.location).stat().st_ino
        if tensor in source.tensors:
            place = source.tensors[tensor]
            assert (where.location, where.offset, where.length) == (place.file.name, place.offset, place.nbytes)
    fresh = sum(p.stat().st_size for p in done.folder.iterdir() if p.stat().st_nlink == 1)
    assert fresh < 2**20


def test_experts_are_used_in_place(exports: dict[str, Exported]) -> None:
    """One slab and one node per layer when they lie side by side, a few when they are torn apart."""
    for name, several in (("moe-float32", False), ("moe-torn-float32", True)):
        graph = onnx.load(str(exports[name].folder / "model.onnx"), load_external_data=False).graph
        found = [node for node in graph.node if node.op_type == "MoEExperts"]
        slabs = {slab for node in found for slab in node.input[3:6]}
        assert (len(slabs) > 1) == several
        assert not any("written" in tensor.name for tensor in graph.initializer)


def test_copy_weights_gives_a_folder_of_its_own(
    checkpoints: dict[str, Path], exports: dict[str, Exported], tmp_path: Path
) -> None:
    """No link to the checkpoint; onnx's own loader takes it; the same numbers come out."""
    copied = tmp_path / "source"
    shutil.copytree(checkpoints["moe"], copied)
    done = export(copied, tmp_path / "out", copy_weights=True)
    shutil.rmtree(copied)
    assert all(path.stat().st_nlink == 1 for path in done.folder.iterdir())
    assert {where.location for where in external_tensors(done.folder).values()} == {DATA_FILE}
    onnx.checker.check_model(str(done.folder / "model.onnx"), full_check=True)
    here, there = Model(done.folder), Model(exports["moe-float32"].folder)
    (call,) = scenario("prefill", here.manifest["model"]["vocab_size"])
    assert torch.equal(here.step({**call, **here.caches(2)})[0], there.step({**call, **there.caches(2)})[0])


def test_what_cannot_be_used_in_place_is_written(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """FP8 blocks are dequantised, one of them an expert's; everything else stays where it is."""
    quantised = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"]
    source = tmp_path / "fp8"
    shutil.copytree(checkpoints["moe"], source, ignore=shutil.ignore_patterns("mla2dsa*"))
    quantise(source, quantised)
    done = export(source, tmp_path / "out")
    written = {entry["name"]: entry["reason"] for entry in done.manifest["weights"]["written"]}
    assert written.keys() == {quantised[0], "model.layers.1.mlp.experts.written"}
    assert all("F8_E4M3" in reason for reason in written.values())
    assert done.manifest["weights"]["written_bytes"] == (done.folder / DATA_FILE).stat().st_size
    model = Model(done.folder)
    calls = scenario("chunks", model.manifest["model"]["vocab_size"])
    assert max(differences(model, Torch(source), calls)) < 1e-4


def quantise(folder: Path, names: list[str]) -> None:
    """Store these tensors as DeepSeek's FP8 blocks."""
    file = folder / "model-dense.safetensors"
    tensors = load_file(file)
    for name in names:
        scale = tensors[name].float().abs().amax() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        blocks = [-(-size // 128) for size in tensors[name].shape]
        tensors[f"{name}_scale_inv"] = scale.expand(blocks).contiguous()
    file.unlink()  # a hard link to the source
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {f"{name}_scale_inv": file.name for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_config(folder, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})


def test_misaligned_tensors_are_written(tmp_path: Path) -> None:
    """The file format allows a float32 at an odd byte; a runtime that maps the file may not."""
    (tmp_path / "x.safetensors").write_bytes(bytes(range(32)))
    (tmp_path / "out").mkdir()
    placement = Placement(tmp_path / "out")
    for name, offset in (("odd", 6), ("even", 8)):
        location = TensorLocation(tmp_path / "x.safetensors", "F32", (3,), offset, 12)
        tensor = placement.tensor(Stored(name, location, lambda: torch.zeros(3)))
        placement.close()
        found = (tmp_path / "out" / tensor.location).read_bytes()[tensor.offset : tensor.offset + tensor.length]
        assert found == bytes(range(offset, offset + 12))
    assert [entry["name"] for entry in placement.written] == ["odd"]
    assert placement.zero_copy_bytes == 12


def test_native_deepseek_v32_without_manifest(
    checkpoints: dict[str, Path], exports: dict[str, Exported], tmp_path: Path
) -> None:
    native = tmp_path / "native"
    shutil.copytree(checkpoints["moe"], native, ignore=shutil.ignore_patterns("mla2dsa*"))
    edit_config(native, {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 2})
    here, there = Model(export(native, tmp_path / "out").folder), Model(exports["moe-float32"].folder)
    (call,) = scenario("prefill", here.manifest["model"]["vocab_size"])
    assert torch.equal(here.step({**call, **here.caches(2)})[0], there.step({**call, **there.caches(2)})[0])


def test_pt2_runs_from_its_file(checkpoints: dict[str, Path], torch_models: dict[str, Torch], tmp_path: Path) -> None:
    done = export(checkpoints["moe"], tmp_path / "out", format="pt2", last_only=True)
    program = torch.export.load(done.folder / done.manifest["file"])
    caches = {
        entry["name"]: torch.zeros(2, CAPACITY, entry["shape"][2])
        for entry in done.manifest["inputs"] if entry["name"].startswith("past_")
    }  # fmt: skip
    for call in scenario("prefill", done.manifest["model"]["vocab_size"]):
        logits, present = program.module()(**call, **caches)
        want = torch_models["moe"].step({**call, **caches})
        torch.testing.assert_close(logits, want[0], atol=1e-5, rtol=1e-5)
        assert [entry["name"] for entry in done.manifest["outputs"][1:]] == [f"present_{n}" for n in names_of(present)]


def names_of(present: dict[str, Tensor]) -> list[str]:
    return [name.removeprefix("present_") for name in present]


def test_all_logits(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """last_only=False: no input `last`, logits of every token, the last of them as with last_only."""
    done = export(checkpoints["moe"], tmp_path / "out", last_only=False)
    model = Model(done.folder)
    (call,) = scenario("prefill", model.manifest["model"]["vocab_size"])
    last = call.pop("last")
    logits = model.step({**call, **model.caches(2)})[0]
    assert logits.shape == (2, 80, model.manifest["model"]["vocab_size"])
    assert done.manifest["logits"] == "all"
    torch_model = Torch(checkpoints["moe"])
    want = torch_model.step({**call, "last": last, **model.caches(2)})[0]
    torch.testing.assert_close(logits[:, -1:], want, atol=1e-4, rtol=1e-4)
