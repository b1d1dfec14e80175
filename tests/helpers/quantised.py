"""Quantised checkpoints as the hub stores them: DeepSeek's FP8 blocks, and experts in INT4 by compressed-tensors (Kimi K2 Thinking)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import edit_config
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
INT4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None, "output_activations": None}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def int4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Experts alone, in groups of 32."""
    if ".mlp.experts." not in name:
        return {name: weight}
    rows, columns = weight.shape
    scale = (weight.view(rows, -1, 32).abs().amax(-1) / 7.5).bfloat16()
    values = (weight.view(rows, -1, 32) / scale.float().unsqueeze(-1)).round().clamp(-8, 7).view(
        rows, columns
    ).long() + 8
    words = sum(values[:, place::8] << (4 * place) for place in range(8))
    signed = torch.where(words < 2**31, words, words - 2**32).int()  # type: ignore[operator, arg-type]
    return {
        f"{name}_packed": signed,
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor([rows, columns], dtype=torch.int32),
    }


def fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Linears alone, in blocks of 128 x 128; the last ones may be smaller."""
    if not name.endswith(("_proj.weight", "_mqa.weight")):
        return {name: weight}
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty([-(-size // BLOCK) for size in weight.shape])
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            part = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
            scales[row, column] = weight[part].abs().max().float() / 448
            values[part] = (weight[part].float() / scales[row, column]).to(values.dtype)
    return {name: values, f"{name}_scale_inv": scales}


FORMATS: Mapping[str, tuple[Callable[[str, Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "int4": (int4, INT4),
    "fp8": (fp8, FP8),
}


def quantise(folder: Path, kind: str) -> Path:
    """The checkpoint in `folder`, in one of FORMATS from now on."""
    make, config = FORMATS[kind]
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored |= make(name, weight)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, {"quantization_config": config})
    return folder
