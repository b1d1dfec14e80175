"""A model whose layers come and go is the model that from_pretrained gives, in what it computes and in what it says of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import build
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.files.model.text_model import HOW_IT_RUNS
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.proof import streamed_model
from mla2dsa.optimizer.proof.streamed_model import StreamedModel, groups, loading_bytes, tensor_sizes

MIB = 2**20
IDS = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([5], [(0, 1)]),
        ([1, 1, 1], [(0, 3)]),
        ([1, 1, 1, 1], [(0, 3), (3, 4)]),
        ([9, 1, 1, 9, 9, 1], [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]),
    ],
    ids=["none", "one-too-large", "all-fit", "one-more", "mixed"],
)
def test_neighbours_are_loaded_together(sizes: list[int], expected: list[tuple[int, int]]) -> None:
    assert [(group.start, group.stop) for group in groups(sizes, 3)] == expected


def test_the_most_memory_is_of_the_largest_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_model, "GROUP_BYTES", 8)
    around, plain = ("model.embed_tokens.weight", 10, 20), ("model.layers.0.mlp.up_proj.weight", 2, 4)
    experts = ("model.layers.1.mlp.experts.0.up_proj.weight", 2, 2)
    assert loading_bytes([around]) == 40 + 20
    assert loading_bytes([around, plain]) == 60 + 8 + 4
    assert loading_bytes([around, plain, experts]) == 60 + 8 + 2 + 16


def checkpoint(folder: Path, name: str) -> Checkpoint:
    build(name).save_pretrained(folder)  # type: ignore[operator]
    return Checkpoint.open(folder)


def plain(made: Checkpoint) -> tuple[Tensor, dict[str, Any]]:
    model_class = getattr(transformers, made.config["architectures"][0])
    model, said = model_class.from_pretrained(made.path, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        return model(IDS, use_cache=False).logits, said


def streamed(made: Checkpoint) -> tuple[Tensor, list[str], StreamedModel]:
    with StreamedModel.of(made, made.config["architectures"][0]) as model, torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits, model.faults(), model


@pytest.mark.parametrize("most", [0, 2**30], ids=["layer-by-layer", "at-once"])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "youtu", "minicpm3", "longcat_flash"])
def test_it_computes_what_the_whole_model_does(
    name: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_model, "GROUP_BYTES", most)
    made = checkpoint(tmp_path, name)
    found, faults, _ = streamed(made)
    assert torch.equal(found, plain(made)[0])
    assert faults == []


def test_keys_are_told_as_transformers_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_model, "GROUP_BYTES", 0)
    checkpoint(tmp_path, "deepseek_v3")
    tensors = load_file(tmp_path / "model.safetensors")
    missing = [name for name in tensors if name.endswith(("layers.1.self_attn.o_proj.weight", "model.norm.weight"))]
    for name in missing:
        tensors[name.replace("weight", "strange")] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    made = Checkpoint.open(tmp_path)
    _, said = plain(made)
    expected = [f"{kind.replace('_', ' ')}: {name}" for kind in said for name in said[kind]]
    assert len(expected) == 4
    assert sorted(streamed(made)[1]) == sorted(expected)


def edited(folder: Path, **fields: Any) -> Checkpoint:
    made = checkpoint(folder, "deepseek_v3")
    (folder / "config.json").write_text(json.dumps({**made.config, **fields}))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("field", sorted(HOW_IT_RUNS))
def test_how_a_model_ran_elsewhere_is_not_asked_for(field: str, tmp_path: Path) -> None:
    assert streamed(edited(tmp_path, **{field: "flash_attention_2"}))[1] == []


def test_what_transformers_does_not_load_is_one_line(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, "deepseek_v3")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"does not load it as DeepseekV3ForCausalLM \(.*--skip-transformers$") as error:
        streamed(made)
    assert "\n" not in str(error.value)


def test_layers_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_model, "GROUP_BYTES", 0)
    made = checkpoint(tmp_path, "deepseek_v3")
    with StreamedModel.of(made, "DeepseekV3ForCausalLM") as model:
        first = model.layer(0)
        assert model.layer(0) is first
        assert {it.device.type for it in first.parameters()} == {"cpu"}
        model.layer(1)
        assert {it.device.type for it in first.parameters()} == {"meta"}
        sizes = loading_bytes(tensor_sizes(made.tensors))
        assert sum(it.numel() * it.itemsize for it in model.layer(1).parameters()) < sizes
