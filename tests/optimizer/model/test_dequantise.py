"""Quantised weights are the numbers that the library which wrote them means, and a checkpoint of them is read through one name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.optimizer.model import dequantise
from mla2dsa.optimizer.model.checkpoint import Checkpoint

GENERATOR = torch.Generator().manual_seed(0)
INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def packed() -> dict[str, Tensor]:
    words = torch.randint(-(2**31), 2**31, (6, 8), generator=GENERATOR, dtype=torch.int32)
    scale = torch.rand(6, 2, generator=GENERATOR).bfloat16()
    return {"x.weight_packed": words, "x.weight_scale": scale, "x.weight_shape": torch.tensor([6, 64])}


def opened(folder: Path, tensors: dict[str, Tensor], quantisation: dict[str, object]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantisation}))
    return Checkpoint.open(folder)


def test_int4_is_what_compressed_tensors_unpacks(tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="not installed")
    parts = packed()
    values = helpers.unpack_from_int32(parts["x.weight_packed"], 4, torch.Size([6, 64]))
    expected = (values.view(6, 2, 32).to(torch.bfloat16) * parts["x.weight_scale"].unsqueeze(-1)).view(6, 64)
    checkpoint = opened(tmp_path, parts, INT4)
    assert {name: (it.dtype, it.shape) for name, it in checkpoint.tensors.items()} == {"x.weight": ("INT4", (6, 64))}
    assert torch.equal(checkpoint.load("x.weight"), expected)
    assert torch.equal(checkpoint.load("x.weight", torch.float32), expected.float())
    assert checkpoint.whole_tensors.keys() == parts.keys()


def test_int4_by_hand() -> None:
    word = sum((value + 8) << (4 * place) for place, value in enumerate([-8, -1, 0, 1, 2, 3, 4, -2]))
    found = dequantise.int4(torch.tensor([[word]], dtype=torch.int32), torch.tensor([[0.5]]))
    assert found.tolist() == [[-4.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, -1.0]]


def test_nvfp4_by_hand(tmp_path: Path) -> None:
    row = [low | high << 4 for low, high in [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13), (14, 15)]]
    parts = {
        "x.weight": torch.tensor([row + row], dtype=torch.uint8), "x.input_scale": torch.ones(()),
        "x.weight_scale": torch.tensor([[2.0, 0.5]]).to(torch.float8_e4m3fn), "x.weight_scale_2": torch.tensor(0.25),
    }  # fmt: skip
    checkpoint = opened(tmp_path, parts, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    assert checkpoint.tensors.keys() == {"x.weight"}
    assert torch.equal(checkpoint.load("x.weight", torch.float32), torch.cat([values * 0.5, values * 0.125])[None])


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    scale = torch.tensor([[4.0]])
    parts = {"x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "x.weight_scale_inv": scale.to(torch.float8_e8m0fnu)}
    checkpoint = opened(tmp_path, parts, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert torch.equal(checkpoint.load("x.weight", torch.float32), torch.full((4, 4), 4.0))


def test_a_shape_that_is_another_one(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, packed() | {"x.weight_shape": torch.tensor([6, 60])}, INT4)
    with pytest.raises(UserError, match=r"x.weight_shape says \[6, 60\], but x.weight_packed holds \[6, 64\]"):
        checkpoint.load("x.weight")
