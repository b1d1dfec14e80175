"""Multi-token-prediction layers: kept or left out, the config says which, and `strip` gives them back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoints import contents, edit_config
from families import build, indexer_weights
from safetensors.torch import load_file, save_file

from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.exporters.dsa.layout import choose
from mla2dsa.exporters.dsa.names import INDEXER_SHARD, ORIGINALS
from mla2dsa.exporters.dsa.strip import strip
from mla2dsa.files.json_files import read_json
from mla2dsa.files.safetensors_index import INDEX_FILE, read_index
from mla2dsa.files.writing import write_json
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.convert import convert
from mla2dsa.optimizer.model.stored_formats import mtp_tensors
from mla2dsa.optimizer.plan import prepare
from mla2dsa.optimizer.recipe import Recipe

INDEXER = IndexerConfig(index_topk=48, index_n_heads=4, index_head_dim=16)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """deepseek_v3 that rotates halves, with an MTP layer: some of it in a shard of its own, some beside the model's."""
    folder = tmp_path / "dense"
    build("deepseek_v3-halfsplit").to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    tensors = load_file(folder / "model.safetensors")
    mtp = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    mtp |= {
        "model.layers.2.eh_proj.weight": torch.ones(64, 128),
        "model.layers.2.shared_head.norm.weight": torch.ones(64),
    }
    shards = {
        "model-1.safetensors": {n: t for n, t in tensors.items() if ".layers.0." in n},
        "model-2.safetensors": {n: t for n, t in {**tensors, **mtp}.items() if ".layers.0." not in n and "2.mlp" not in n},
        "model-3.safetensors": {n: t for n, t in mtp.items() if "2.mlp" in n},
    }  # fmt: skip
    (folder / "model.safetensors").unlink()
    for name, part in shards.items():
        save_file(part, folder / name, {"format": "pt"})
    write_json(
        folder / INDEX_FILE, {"metadata": {}, "weight_map": {n: file for file, part in shards.items() for n in part}}
    )
    edit_config(folder, {"num_nextn_predict_layers": 1})
    return folder


def written(source: Path, out: Path, mtp: str, layers: int = 2) -> Path:
    config, tensors = read_json(source / "config.json"), read_index(source)
    weights = {f"model.layers.{layer}.self_attn": indexer_weights(INDEXER, 64, 48, layer) for layer in range(layers)}
    return write_dsa_checkpoint(
        source,
        out,
        weights,
        INDEXER,
        manifest={},
        layout=choose(config, tensors, mtp=mtp),
        mtp=mtp_tensors(config, tensors),
    )


@pytest.mark.parametrize(("mtp", "count"), [("keep", 1), ("drop", 0)])
def test_the_config_says_what_is_there(mtp: str, count: int, dense: Path, tmp_path: Path) -> None:
    out = written(dense, tmp_path / "dsa", mtp)
    stored = {name for name in read_index(out) if ".layers.2." in name}
    assert bool(stored) == bool(count)
    assert stored == {name for name in read_index(dense) if ".layers.2." in name and count}
    assert read_json(out / "config.json")["num_nextn_predict_layers"] == count
    manifest = read_json(out / "mla2dsa.json")
    assert manifest["indexer"]["mtp_layers_without"] == ["model.layers.2.self_attn"][:count]
    assert bool(manifest["layout"]["dropped"]) == (not count)


def test_rotary_rows_of_a_kept_layer_are_reordered_too(dense: Path, tmp_path: Path) -> None:
    derived = {
        it["name"] for it in read_json(written(dense, tmp_path / "dsa", "keep") / "mla2dsa.json")["layout"]["derived"]
    }
    assert {name for name in derived if ".layers.2." in name} == {
        f"model.layers.2.self_attn.{name}.weight" for name in ("q_b_proj", "kv_a_proj_with_mqa")
    }


@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_strip_gives_them_back(mtp: str, dense: Path, tmp_path: Path) -> None:
    out = written(dense, tmp_path / "dsa", mtp)
    assert contents(strip(out, tmp_path / "again")) == contents(dense)
    assert (out / ORIGINALS).exists()
    whole = out / ("model-3.safetensors" if mtp == "keep" else f"{ORIGINALS}-model-3")  # nothing of it is in the model
    assert os.path.samefile(dense / "model-3.safetensors", whole)
    assert len(list(out.glob("*model-3*"))) == 1


def test_transformers_loads_what_is_left(dense: Path, tmp_path: Path) -> None:
    from transformers import DeepseekV32ForCausalLM

    _, info = DeepseekV32ForCausalLM.from_pretrained(written(dense, tmp_path / "dsa", "drop"), output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("layers", [2, 3], ids=["without", "with"])
def test_a_donor_gives_what_it_has(layers: int, dense: Path, tmp_path: Path) -> None:
    """DeepSeek-V3.2 has an indexer in its multi-token-prediction layer; without one, the layer stays as it is."""
    donor, out, mtp = written(dense, tmp_path / "donor", "keep", layers), tmp_path / "dsa", "model.layers.2.self_attn"
    planned = prepare(str(dense), Recipe(indexer="donor", donor=str(donor)))
    assert planned.mtp_modules == (mtp,)[: layers - 2]
    assert any("with the donor's indexers" in note for note in planned.plan.notes) == (layers == 3)
    vllm = next(found for found in planned.plan.targets if found.target == "vllm")
    assert any("multi-token-prediction" in warning for warning in vllm.notes) == (layers == 2)
    convert(str(dense), out, Recipe(indexer="donor", donor=str(donor)), skip_verification=True)
    made, given = contents(out)[INDEXER_SHARD], contents(donor)[INDEXER_SHARD]
    assert made == given
    assert (f"{mtp}.indexer.wk.weight" in read_index(out)) == (layers == 3)
    assert read_json(out / "mla2dsa.json")["indexer"]["mtp_layers_without"] == [mtp][: 3 - layers]
