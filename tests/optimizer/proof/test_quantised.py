"""transformers is a witness for quantised checkpoints, too: it dequantises them on the CPU, where the packages for it are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, indexer_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.exporters.dsa.strip import strip
from mla2dsa.files.json_files import read_json
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.proof import transformers_check
from mla2dsa.optimizer.proof.pair import open_pair
from mla2dsa.optimizer.verify import _against_transformers

INDEXER = IndexerConfig(index_topk=32, index_n_heads=4, index_head_dim=16)
IDS = torch.randint(3, 128, (60,), generator=torch.Generator().manual_seed(1))
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
    if not name.endswith(("_proj.weight", "_mqa.weight")):
        return {name: weight}
    scale = weight.abs().max().reshape(1, 1) / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


KINDS: dict[str, tuple[Callable[[str, Tensor], dict[str, Tensor]], dict[str, Any], str]] = {
    "int4": (int4, INT4, "compressed_tensors"),
    "fp8": (fp8, FP8, "accelerate"),
}


def quantised(folder: Path, kind: str) -> Path:
    build("deepseek_v3", moe_intermediate_size=32).save_pretrained(folder)  # type: ignore[operator]
    make, config, _ = KINDS[kind]
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored |= make(name, weight)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    fields = {**read_json(folder / "config.json"), "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_checkpoint_is_proved(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers dequantises with it")
    pytest.importorskip(KINDS[kind][2], reason="transformers reads this format with it")
    source = quantised(tmp_path / "dense", kind)
    weights = {f"model.layers.{layer}.self_attn": indexer_weights(INDEXER, 64, 48, layer) for layer in range(2)}
    out = write_dsa_checkpoint(source, tmp_path / "dsa", weights, INDEXER, manifest={})
    checks = _against_transformers(open_pair(source, out), [IDS])
    assert [(check.name, check.value, check.detail) for check in checks if not check.passed] == []
    assert len(checks) == 4
    kept = load_file(out / "model-dense.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in load_file(source / "model.safetensors").items())
    strip(out, tmp_path / "stripped")
    assert (tmp_path / "stripped" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("kind", "fields", "there", "part"),
    [
        ("fp8", {}, True, None),
        ("fp8", {}, False, "needs accelerate for fp8 (pip install 'mla2dsa[quantised]')"),
        ("int4", {}, False, "needs accelerate and compressed-tensors for compressed-tensors"),
        ("fp8", {"quantization_config": {**FP8, "weight_block_size": [40, 40]}}, True, "blocks of equal size"),
        ("int4", {"quantization_config": {"quant_method": "modelopt"}}, True, "does not dequantise modelopt on a CPU"),
        ("int4", {"quantization_config": None}, False, None),
    ],
    ids=["fp8", "fp8-without-accelerate", "int4-without-packages", "uneven-blocks", "modelopt", "plain"],
)
def test_why_transformers_is_no_witness(
    kind: str, fields: dict[str, Any], there: bool, part: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_check, "find_spec", lambda name: name if there else None)
    source = quantised(tmp_path, kind)
    (source / "config.json").write_text(json.dumps({**read_json(source / "config.json"), **fields}))
    reason = transformers_check.unreadable(Checkpoint.open(source))
    assert (reason is None) if part is None else (reason is not None and part in reason)
