"""Layers that attend to what an earlier one selected (GLM-5.2), from config.json to onnxruntime, held against transformers' own class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import onnx
import pytest
import torch
from checkpoints import assert_one_line, edit_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.files.manifests.export_manifest import read_export
from mla2dsa.optimizer.export import export
from mla2dsa.optimizer.inspect import inspect
from mla2dsa.optimizer.model.cached_model import (
    dense_config,
    indexer_of,
    open_cached,
    open_torch_session,
    shared_layers,
)
from mla2dsa.optimizer.model.capture import capture
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.model.donor import Donor
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.optimizer.proof.evaluate import program_inputs
from mla2dsa.optimizer.proof.pair import open_pair
from mla2dsa.optimizer.proof.transformers_check import parity
from mla2dsa.passes.mla_to_dsa import mla_to_dsa
from mla2dsa.runtime.execute import PieceRunner
from mla2dsa.runtime.generation import Sampling, generate
from mla2dsa.runtime.logits import Logits
from mla2dsa.runtime.ort_session import OrtSession

TOPK, LAYERS, SHARED = 8, 4, (1, 2)
KINDS = ["full", "shared", "shared", "full"]
LAYER = "model.layers.{}.self_attn"
IDS = torch.randint(3, families.VOCAB, (64,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model() -> Any:
    options = {"num_hidden_layers": LAYERS, "mlp_layer_types": ["dense"] * LAYERS, "indexer_types": KINDS}
    return families.build("glm_moe_dsa", index_topk=TOPK, index_n_heads=16, **options)


@pytest.fixture(scope="module")
def made(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the hub says it: by a schedule, not by a list."""
    folder = tmp_path_factory.mktemp("glm") / "glm52"
    model.save_pretrained(folder)
    edit_config(folder, {"indexer_types": None, "index_topk_freq": 3, "index_skip_topk_offset": 1})
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture(scope="module")
def exported(made: Path) -> Path:
    return export(made, made.parent / "onnx", max_seq=96).folder


def test_the_graph_is_that_of_transformers(made: Path, model: Any) -> None:
    """Up to index_topk, and above it over equal selections, which are transformers' own up to rounding."""
    checkpoint = Checkpoint.open(made)
    captured = capture(dense_config(checkpoint), dtype=torch.float32)
    converted = mla_to_dsa(captured.program, indexer_of(checkpoint))
    program, nodes = converted.program, list(converted.program.graph.nodes)
    selectors = [node for node in nodes if node.target is torch.ops.mla2dsa.lightning_indexer.default]
    readers = [node for node in nodes if node.target is torch.ops.mla2dsa.sparse_mla.default]
    assert [selectors.index(node.args[2]) for node in readers] == [0, 0, 0, 1]
    assert {name.partition(".indexer.")[0] for name in converted.added} == {LAYER.format(0), LAYER.format(3)}

    load = WeightSource(checkpoint, captured).loader(program)
    runner = PieceRunner(program, load, [change.after for change in converted.changes])
    for length in (TOPK, len(IDS)):
        inputs, found = program_inputs(IDS[:length]), {}
        for seen in runner.run([inputs], [runner.outputs[0], *(node.name for node in selectors)]):
            found |= seen.values
        difference, shortfall = parity(model, inputs, Logits(found.pop(runner.outputs[0])), list(found.values()))
        assert difference < 1e-5
        assert shortfall < 1e-5


def greedy(session: Any, prompt: list[int], count: int) -> list[int | None]:
    return [row[0] for row in generate(session, [prompt], count, Sampling())]


def test_torch_and_onnxruntime_write_what_transformers_writes(made: Path, exported: Path, model: Any) -> None:
    """Through the caches, token by token: with every key selected as transformers does, and beyond that as each other."""
    short, long = IDS[:4].tolist(), IDS[:40].tolist()
    torch_session, ort = open_torch_session(made, 1, capacity=96), OrtSession(exported, 1, threads=1)
    expected = model.generate(torch.tensor([short]), max_new_tokens=4, do_sample=False, eos_token_id=None)[
        0, 4:
    ].tolist()
    assert greedy(torch_session, short, 4) == greedy(ort, short, 4) == expected
    assert greedy(torch_session, long, 8) == greedy(ort, long, 8)


def test_what_is_exported(exported: Path, made: Path) -> None:
    """A layer that shares has a latent cache and a sparse attention, and no index keys."""
    manifest = read_export(exported)
    assert [cache["index_key"] is None for cache in manifest["caches"]] == [layer in SHARED for layer in range(LAYERS)]
    assert [it["name"] for it in manifest["outputs"]] == [
        "logits", "present_index_key_0", "present_latent_0", "present_latent_1", "present_latent_2", "present_index_key_3",
        "present_latent_3",
    ]  # fmt: skip
    graph = onnx.load(str(exported / "model.onnx"), load_external_data=False).graph
    ours = [node.name for node in graph.node if node.domain == "mla2dsa" and "self_attn" in node.name]
    full = ["CacheWrite_0", "LightningIndexer", "CacheWrite_1", "SparseMLA"]
    kinds = [full if layer not in SHARED else full[2:] for layer in range(LAYERS)]
    assert ours == [f"{LAYER.format(layer)}/{name}" for layer in range(LAYERS) for name in kinds[layer]]
    latent, key = 32 + 8, 16
    assert inspect(str(exported))["cache_values_per_token"] == LAYERS * latent + 2 * key
    told = inspect(str(made))
    assert (told["indexer_layers"], told["cache_bytes_per_token"]["index_key"]) == (2, 2 * 2 * key)


# What config.json says


@pytest.mark.parametrize(
    "fields",
    [
        {"indexer_types": ["full", "full", "shared", "shared"]},
        {"indexer_types": ["full", "shared", "shared", "full", "shared"]},
        {"index_topk_pattern": "FSFS"},
        {"index_topk_pattern": ["full", "shared", "full", "full"], "index_topk_freq": 2},
        {"index_topk_freq": 2},
        {"index_topk_freq": 3, "index_skip_topk_offset": 1},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_freq": 1, "index_skip_topk_offset": 0},
        {"index_topk_freq": 0},
        {},
    ],
    ids=str,
)
def test_layers_are_those_of_transformers(copy: Path, fields: dict[str, Any]) -> None:
    from transformers import GlmMoeDsaConfig

    edit_config(copy, {"index_topk_freq": 1, "index_skip_topk_offset": 2, **fields})
    kinds = GlmMoeDsaConfig(num_hidden_layers=LAYERS, **fields).indexer_types[:LAYERS]
    assert shared_layers(Checkpoint.open(copy)) == tuple(i for i, kind in enumerate(kinds) if kind == "shared")


V32 = {"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"indexer_types": ["shared", "full", "full", "full"]}, "indexer_types has the first layer share a selection"),
        ({"index_skip_topk_offset": 0}, "index_topk_freq has the first layer share a selection"),
        ({"indexer_types": ["full", "shared"]}, "indexer_types has 2 layers, num_hidden_layers is 4"),
        ({"indexer_types": []}, "indexer_types has 0 layers, num_hidden_layers is 4"),
        ({"indexer_types": ["full", "half", "full", "full"]}, "indexer_types has 'half', expected full or shared"),
        ({"index_topk_pattern": "FXFS"}, "index_topk_pattern has 'X', expected full or shared"),
        ({"index_topk_pattern": 4}, "index_topk_pattern is 4, expected a letter a layer"),
        ({"index_topk_freq": "2"}, "index_topk_freq is 2, index_skip_topk_offset 1: expected numbers"),
        (V32, "index_topk_freq shares indexers between layers, which of the classes here only glm_moe_dsa does"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_means_no_such_model(copy: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(copy, fields)
    with pytest.raises(UserError) as caught:
        open_cached(Checkpoint.open(copy), torch.float32, last_only=True)
    assert_one_line(caught, copy, message)


def test_an_indexer_in_a_layer_that_shares_is_not_left_out_silently(copy: Path) -> None:
    tensors: dict[str, Tensor] = load_file(copy / "model.safetensors")
    name = LAYER.format(1) + ".indexer.wk.weight"
    save_file({**tensors, name: torch.zeros(16, 64)}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as caught:
        open_cached(Checkpoint.open(copy), torch.float32, last_only=True)
    assert_one_line(caught, name, "stored, but nothing in the model of config.json reads it")


def test_it_is_no_donor(made: Path) -> None:
    with pytest.raises(UserError) as caught:
        Donor.open(str(made))
    assert_one_line(caught, made, "no indexer in 2 of its layers (1, 2)", "an earlier one", "--indexer closed-form")


def test_it_is_a_pair_with_its_dense_base(made: Path, copy: Path) -> None:
    """As what `convert --share` writes is."""
    tensors = load_file(copy / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if ".indexer." not in n}, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(dense_config(Checkpoint.open(made))))
    pair = open_pair(copy, made)
    assert pair.config.shared == (1, 2)
    assert list(pair.indexers()) == [LAYER.format(layer) for layer in (0, 3)]
