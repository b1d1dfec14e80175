"""WeightSource: names of the graph become tensors of the checkpoint, as transformers itself would load them."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
from comparing import close
from safetensors.torch import load_file, save_file
from saved import opened, run, saved, tensors, transformers_model
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.model.capture import capture
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.passes.mla_to_dsa import mla_to_dsa

FAMILIES = ("deepseek_v3", "deepseek_v2", "deepseek_v2-lite", "glm4_moe_lite", "minicpm3", "mistral4", "youtu", "axk1")
CONFIG = IndexerConfig(index_topk=8, index_n_heads=2, index_head_dim=16)
EXPERTS = "model.layers.1.mlp.experts"
SITES = ("model.layers.0.self_attn", "model.layers.1.self_attn")


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, like: Path, weights: dict[str, Tensor], **config: object) -> WeightSource:
    """A checkpoint with other weights, opened."""
    fields = {**json.loads((like / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(weights, folder / "model.safetensors")
    return opened(folder)


@pytest.fixture
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("deepseek_v3", tmp_path_factory)


# What the checkpoint must hold


@pytest.mark.parametrize("name", FAMILIES)
def test_expected_is_what_transformers_saves(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(name, tmp_path_factory)
    stored = {tensor: tuple(value.shape) for tensor, value in weights_of(folder).items()}
    assert opened(folder).expected() == stored


def test_longcat_needs_no_weights_of_its_zero_experts(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved("longcat_flash", tmp_path_factory)
    stored = {tensor: tuple(value.shape) for tensor, value in weights_of(folder).items()}
    expected = opened(folder).expected()
    assert expected.items() <= stored.items()
    extra = {tensor.split(".experts.")[1].split(".")[0] for tensor in stored.keys() - expected.keys()}
    assert extra == {"8", "9", "10", "11"}


# Every tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_transformers(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(name, tmp_path_factory)
    source, held = opened(folder), transformers_model(folder).state_dict()
    load = source.loader(source.capture.program)
    assert set(source.capture.shapes) == set(held)
    for tensor, value in held.items():
        assert torch.equal(load(tensor), value), tensor


def test_experts_are_stacked_gate_before_up(moe: Path) -> None:
    source, stored = opened(moe), weights_of(moe)
    load = source.loader(source.capture.program)
    gate_up, down = load(f"{EXPERTS}.gate_up_proj"), load(f"{EXPERTS}.down_proj")
    for expert in range(8):
        assert torch.equal(gate_up[expert, :16], stored[f"{EXPERTS}.{expert}.gate_proj.weight"])
        assert torch.equal(gate_up[expert, 16:], stored[f"{EXPERTS}.{expert}.up_proj.weight"])
        assert torch.equal(down[expert], stored[f"{EXPERTS}.{expert}.down_proj.weight"])


def test_experts_stored_in_one_tensor(moe: Path, tmp_path: Path) -> None:
    """Some tools save them as transformers holds them."""
    load = opened(moe).loader(opened(moe).capture.program)
    stacked = {name: load(name) for name in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj")}
    rest = {name: value for name, value in weights_of(moe).items() if ".experts." not in name}
    source = write(tmp_path, moe, rest | stacked)
    source.checkpoint.check_shapes(source.expected())
    load = source.loader(source.capture.program)
    for name, value in stacked.items():
        assert torch.equal(load(name), value)


def test_tied_head_is_the_embedding(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = opened(saved("minicpm3", tmp_path_factory))
    assert "lm_head.weight" not in source.checkpoint.tensors
    load = source.loader(source.capture.program)
    embedding = source.checkpoint.load("model.embed_tokens.weight")
    assert torch.equal(load("lm_head.weight"), embedding)
    assert torch.equal(load("model.embed_tokens.weight"), embedding)


def test_stored_bfloat16_comes_in_the_dtype_of_the_graph(moe: Path, tmp_path: Path) -> None:
    rounded = {name: value.to(torch.bfloat16) for name, value in weights_of(moe).items()}
    source = write(tmp_path, moe, rounded)
    load = source.loader(source.capture.program)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert load(name).dtype == torch.float32
    assert torch.equal(load(name), rounded[name].float())
    assert torch.equal(load(f"{EXPERTS}.down_proj")[3], rounded[f"{EXPERTS}.3.down_proj.weight"].float())


def test_computed_buffers_come_from_the_program(moe: Path) -> None:
    source = opened(moe)
    names = [n for n in source.capture.program.constants if n.endswith("inv_freq")]
    assert names
    for name in names:
        assert torch.equal(source.loader(source.capture.program)(name), source.capture.program.constants[name])


def test_fp8_blocks_are_dequantised(moe: Path, tmp_path: Path) -> None:
    """Experts and attention in DeepSeek's block format: the graph computes with the dequantised weights."""
    block, exact, stored = 16, {}, {}
    for name, value in weights_of(moe).items():
        if (name.endswith(("_proj.weight", "_mqa.weight")) and ".mlp." in name) or "kv_b_proj" in name:
            stored[name], stored[f"{name}_scale_inv"], exact[name] = quantised(value, block)
        else:
            stored[name] = exact[name] = value
    fp8, plain = tmp_path / "fp8", tmp_path / "plain"
    fp8.mkdir()
    plain.mkdir()
    quantisation = {"quant_method": "fp8", "weight_block_size": [block, block]}
    source = write(fp8, moe, stored, quantization_config=quantisation)
    expected = write(plain, moe, exact)
    source.checkpoint.check_shapes(source.expected())
    batch = tensors(families.inputs(2, 9))
    assert sum(value.dtype == torch.float8_e4m3fn for value in stored.values()) > 20
    assert torch.equal(run(source, batch), run(expected, batch))
    assert not torch.equal(run(source, batch), run(opened(moe), batch))


def quantised(weight: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block-quantised [O, I], its scale, and the values it stands for."""
    rows, columns = (-(-size // block) for size in weight.shape)
    scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(weight.numel())) + 0.5
    spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: weight.shape[0], : weight.shape[1]]
    packed = (weight / spread).to(torch.float8_e4m3fn)
    return packed, scale, packed.float() * spread


# Indexers


def test_indexers_given_by_layer(moe: Path) -> None:
    source = opened(moe)
    converted = mla_to_dsa(source.capture.program, CONFIG).program
    given = {name: families.indexer_weights(CONFIG, 64, 48, seed) for seed, name in enumerate(SITES)}
    load = WeightSource(source.checkpoint, source.capture, indexers=given).loader(converted)
    for layer, weights in given.items():
        for tensor, value in weights.tensors().items():
            assert torch.equal(load(f"{layer}.indexer.{tensor}"), value)
    assert torch.equal(load("model.norm.weight"), source.checkpoint.load("model.norm.weight"))


def test_indexers_of_the_checkpoint(moe: Path, tmp_path: Path) -> None:
    given = {name: families.indexer_weights(CONFIG, 64, 48, seed) for seed, name in enumerate(SITES)}
    added = {f"{layer}.indexer.{name}": v for layer, w in given.items() for name, v in w.tensors().items()}
    source = write(tmp_path, moe, weights_of(moe) | added)
    load = source.loader(mla_to_dsa(source.capture.program, CONFIG).program)
    for name, value in added.items():
        assert torch.equal(load(name), value)


def test_indexers_take_the_dtype_of_the_graph(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a bfloat16 graph all but weights_proj, which is never computed in half precision."""
    folder = saved("minicpm3", tmp_path_factory)
    checkpoint = Checkpoint.open(folder)
    half = capture(checkpoint.config, dtype=torch.bfloat16)
    given = {name: families.indexer_weights(CONFIG, 64, 48) for name in SITES}
    load = WeightSource(checkpoint, half, indexers=given).loader(mla_to_dsa(half.program, CONFIG).program)
    assert load(f"{SITES[0]}.indexer.wk.weight").dtype == torch.bfloat16
    assert load(f"{SITES[0]}.indexer.weights_proj.weight").dtype == torch.float32
    assert load("model.norm.weight").dtype == torch.bfloat16


# What is wrong with a checkpoint


@pytest.mark.parametrize(
    ("name", "asked"),
    [("model.layers.0.self_attn.kv_b_proj.weight",) * 2,
     (f"{EXPERTS}.5.up_proj.weight", f"{EXPERTS}.gate_up_proj")],
    ids=["plain", "one-expert"],
)  # fmt: skip
def test_missing_tensor_is_named(moe: Path, tmp_path: Path, name: str, asked: str) -> None:
    source = write(tmp_path, moe, {n: v for n, v in weights_of(moe).items() if n != name})
    with pytest.raises(UserError, match=f"{name} is missing"):
        source.checkpoint.check_shapes(source.expected())
    with pytest.raises(UserError, match=f"no tensor {name}"):
        source.loader(source.capture.program)(asked)


def test_wrong_shape_is_named(moe: Path, tmp_path: Path) -> None:
    name = f"{EXPERTS}.5.up_proj.weight"
    source = write(tmp_path, moe, weights_of(moe) | {name: torch.zeros(8, 64)})
    with pytest.raises(UserError, match=r"up_proj.weight is \[8, 64\], config.json gives \[16, 64\]"):
        source.checkpoint.check_shapes(source.expected())


def test_nan_in_an_expert_is_named(moe: Path, tmp_path: Path) -> None:
    name = f"{EXPERTS}.5.up_proj.weight"
    source = write(tmp_path, moe, weights_of(moe) | {name: torch.full((16, 64), float("nan"))})
    with pytest.raises(UserError, match=rf"{name} has 1024 NaN"):
        source.loader(source.capture.program)(f"{EXPERTS}.gate_up_proj")


def test_the_same_numbers_after_all(moe: Path) -> None:
    """The whole path once more: loaded by name, run, and equal to transformers."""
    inputs = families.inputs(1, 17)
    close(run(opened(moe), tensors(inputs))[0], families.logits(transformers_model(moe), inputs), of_max=1e-6)
