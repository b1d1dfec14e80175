"""transformers is a witness for quantised checkpoints, too: it dequantises them on the CPU, where the packages for it are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, indexer_weights
from quantised import FP8, quantise
from safetensors.torch import load_file

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
NEEDS = {"int4": "compressed_tensors", "fp8": "accelerate"}


def quantised(folder: Path, kind: str) -> Path:
    build("deepseek_v3", moe_intermediate_size=32).save_pretrained(folder)  # type: ignore[operator]
    return quantise(folder, kind)


@pytest.mark.parametrize("kind", NEEDS)
def test_a_quantised_checkpoint_is_proved(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers dequantises with it")
    pytest.importorskip(NEEDS[kind], reason="transformers reads this format with it")
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
