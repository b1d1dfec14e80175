"""What is quantised is told by the tensors: every foreign format is named, and so is a config.json that says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import assert_one_line
from safetensors.torch import save_file
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.files.safetensors_index import read_index
from mla2dsa.optimizer.model.packed_formats import whole_weights
from mla2dsa.optimizer.model.stored_formats import check_formats, mtp_tensors, stale_fields

NAME = "model.layers.0.mlp.up_proj"
INT8, UINT8, INT32 = (torch.zeros(4, 4, dtype=it) for it in (torch.int8, torch.uint8, torch.int32))
E4M3, E5M2 = (torch.ones(4, 4).to(it) for it in (torch.float8_e4m3fn, torch.float8_e5m2))
ONE = torch.ones(1, 1)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}

SHAPE = torch.tensor([4, 32])
PACKED = {"weight_packed": INT32, "weight_scale": torch.ones(4, 1), "weight_shape": SHAPE}
NVFP4 = {
    "weight": torch.zeros(4, 8, dtype=torch.uint8), "weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn),
    "weight_scale_2": torch.ones(()), "input_scale": torch.ones(()),
}  # fmt: skip
INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
UE8M0 = ONE.to(torch.float8_e8m0fnu)

# Tensors of a module by their last names, other files of the folder, config.json, and what the error says.
Case = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], tuple[str, ...]]
FOREIGN: dict[str, Case] = {
    "int8": ({"weight": INT8, "weight_scale": torch.ones(4, 1)}, {}, {}, ("weight is I8", "INT8 with a weight_scale")),
    "int8-with-a-method": (
        {"weight": INT8, "weight_scale": ONE},
        {},
        {"quantization_config": {"quant_method": "w8a8_int8"}},
        ("weight is I8", "quantization_config says w8a8_int8"),
    ),
    "nvfp4-of-another-grid": (
        {"weight": UINT8, "weight_scale": E4M3, "weight_scale_2": ONE},
        {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}},
        {},
        ("NVFP4, as NVIDIA's ModelOpt writes it", "hf_quant_config.json says NVFP4"),
    ),
    "gptq": ({"qweight": INT32, "g_idx": INT32}, {}, {}, ("is I32", "GPTQ")),
    "awq": ({"qweight": INT32, "qzeros": INT32}, {}, {"quantization_config": {"quant_method": "awq"}}, ("says awq",)),
    "packed": ({"weight_packed": INT32, "weight_scale": ONE}, {}, {}, ("weight_packed is I32", "compressed-tensors")),
    "bitsandbytes-4bit": ({"weight": UINT8, "weight.absmax": ONE}, {}, {}, ("weight is U8", "bitsandbytes 4-bit")),
    "bitsandbytes-8bit": ({"weight": INT8, "SCB": ONE}, {}, {}, ("weight is I8", "bitsandbytes INT8")),
    "packed-by-zero-points": (
        {"weight_packed": INT32, "weight_scale": torch.ones(4, 1), "weight_shape": SHAPE, "weight_zero_point": INT32}, {}, {},
        ("packed by compressed-tensors",),
    ),
    "int4-of-eight-bits": (
        PACKED, {}, {"quantization_config": {**INT4, "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}},
        ("up_proj.weight packed as INT4", "config_groups.group_0.weights.num_bits is 8, expected 4"),
    ),
    "int4-unsaid": (PACKED, {}, {}, ("packed as INT4", "no quantization_config", "compressed-tensors")),
    "nvfp4-called-otherwise": (
        NVFP4, {}, {"quantization_config": FP8}, ("packed as NVFP4", "quant_method is fp8, expected modelopt"),
    ),
    "mxfp4": ({"up_blocks": UINT8, "up_scales": UINT8}, {}, {}, ("is U8", "MXFP4")),
    "fp8-per-channel": ({"weight": E4M3, "weight_scale": torch.ones(4, 1)}, {}, {}, ("is F8_E4M3", "FP8 with a weight_scale per")),
    "fp8-e5m2-per-tensor": ({"weight": E5M2, "weight_scale": ONE}, {}, {}, ("is F8_E5M2", "per channel or tensor")),
    "fp8-without-scales": ({"weight": E4M3}, {}, {"quantization_config": FP8}, ("is F8_E4M3", "without", "_scale_inv")),
    "fp8-of-amd": ({"weight": torch.ones(4, 4).to(torch.float8_e4m3fnuz)}, {}, {}, ("F8_E4M3FNUZ", "AMD's FP8")),
    "integers-of-no-format": ({"weight": torch.ones(4, 4, dtype=torch.int64)}, {}, {}, ("weight is I64", "a quantised format")),
    "booleans": ({"weight": torch.ones(4, 4, dtype=torch.bool)}, {}, {}, ("weight is BOOL",)),
    "fp8-of-another-grid": (
        {"weight": E4M3, "weight_scale_inv": torch.ones(2, 2)}, {}, {"quantization_config": FP8},
        ("weight_scale_inv is F32 [2, 2]", "expected [1, 1]", "weight_block_size"),
    ),
    "fp8-unsaid": (
        {"weight": E4M3, "weight_scale_inv": ONE}, {}, {},
        ("in float8 with block scales", "no quantization_config", "put it back"),
    ),
    "fp8-called-otherwise": (
        {"weight": E4M3, "weight_scale_inv": ONE}, {}, {"quantization_config": {"quant_method": "compressed-tensors"}},
        ("quant_method is compressed-tensors, expected fp8",),
    ),
    "stale-fp8": (
        {"weight": torch.ones(4, 4).bfloat16()}, {}, {"quantization_config": FP8},
        ("config.json: quantization_config (quant_method fp8) is stale", "(BF16)", "--drop-stale-quantization"),
    ),
    "stale-compression": (
        {"weight": torch.ones(4, 4)}, {}, {"compression_config": {"quant_method": "compressed-tensors"}},
        ("compression_config (quant_method compressed-tensors) is stale", "remove the field"),
    ),
}  # fmt: skip
READ: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "float32": ({"weight": torch.ones(4, 4)}, {}),
    "float16": ({"weight": torch.ones(4, 4).half()}, {"quantization_config": None}),
    "bfloat16": ({"weight": torch.ones(4, 4).bfloat16()}, {}),
    "fp8-scales-of-two": ({"weight": E4M3, "weight_scale_inv": UE8M0}, {"quantization_config": FP8}),
    "int4": (PACKED, {"quantization_config": INT4}),
    "nvfp4": (NVFP4, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}),
    "fp8-blocks": ({"weight": E4M3, "weight_scale_inv": ONE}, {"quantization_config": FP8}),
}


def opened(folder: Path, tensors: dict[str, Tensor], files: dict[str, Any], config: dict[str, Any]) -> Any:
    save_file({f"{NAME}.{name}": tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder, whole_weights(read_index(folder)), {"num_hidden_layers": 1, **config}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_formats_are_named(case: str, tmp_path: Path) -> None:
    tensors, files, config, parts = FOREIGN[case]
    with pytest.raises(UserError) as error:
        check_formats(*opened(tmp_path, tensors, files, config))
    assert_one_line(error, tmp_path, NAME if "stale" not in case else "config.json", *parts)


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case: str, tmp_path: Path) -> None:
    check_formats(*opened(tmp_path, READ[case][0], {}, READ[case][1]))


@pytest.mark.parametrize("case", FOREIGN)
def test_only_a_stale_field_may_be_dropped(case: str, tmp_path: Path) -> None:
    tensors, files, config, _ = FOREIGN[case]
    _, places, config = opened(tmp_path, tensors, files, config)
    assert bool(stale_fields(config, places)) == case.startswith("stale")


def test_layers_of_multi_token_prediction_are_told_by_their_parts() -> None:
    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(4)]
    mtp = ["model.layers.3.eh_proj.weight", "mtp.0.x.weight"]
    assert mtp_tensors({"num_hidden_layers": 2}, [*names, *mtp]) == {names[3], *mtp}
    assert mtp_tensors({"num_hidden_layers": 4}, [*names, mtp[0]]) == set()
    assert mtp_tensors({"num_hidden_layers": 2}, names) == set()
