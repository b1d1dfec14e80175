"""config.json of a DSA checkpoint is the truth about it: edits are obeyed as transformers obeys them, or refused by field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import YARN, edit_config, random_indexers, save_dense
from command_line import assert_refused, mla2dsa
from torch import Tensor

from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.files.manifests.export_manifest import EXPORT_MANIFEST
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.export import export
from mla2dsa.optimizer.model.cached_model import dense_config, open_torch_session
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.runtime.generation import Session, prefill
from mla2dsa.runtime.ort_session import OrtSession

INDEXER = IndexerConfig(index_topk=16, index_n_heads=16, index_head_dim=32)
IDS = torch.randint(1, 160, (1, 100), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense` and `dsa`, with experts in the second layer."""
    place = tmp_path_factory.mktemp("edited")
    save_dense(place / "dense", num_hidden_layers=2, first_k_dense_replace=1)
    weights = random_indexers(place / "dense", INDEXER)
    write_dsa_checkpoint(place / "dense", place / "dsa", weights, INDEXER, manifest={})
    return place


@pytest.fixture
def dsa(made: Path, tmp_path: Path) -> Path:
    """A copy for a test to edit."""
    return Path(shutil.copytree(made / "dsa", tmp_path / "dsa"))


def expected(folder: Path) -> Tensor:
    """Logits of the last token, by transformers."""
    from transformers import DeepseekV32ForCausalLM

    model = DeepseekV32ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: Tensor = model(IDS, use_cache=False).logits[:, -1]
    return logits


def ours(session: Session) -> Tensor:
    return prefill(session, [IDS[0].tolist()], IDS.shape[1])


def drift(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


OBEYED: dict[str, dict[str, Any]] = {
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 2048},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "routed-scaling": {"routed_scaling_factor": 0.5},
    "experts-per-token": {"num_experts_per_tok": 1},
    "norm-eps": {"rms_norm_eps": 0.1},
    "index-topk": {"index_topk": 8},
    "normalised-routing": {"norm_topk_prob": False},
}


@pytest.mark.parametrize("case", OBEYED)
def test_edits_are_obeyed(case: str, made: Path, dsa: Path) -> None:
    edit_config(dsa, OBEYED[case])
    reference = expected(dsa)
    assert drift(expected(made / "dsa"), reference) > 1e-3  # the edit matters
    assert drift(ours(open_torch_session(dsa, 1)), reference) < 1e-4


def test_an_export_obeys_too(dsa: Path, tmp_path: Path) -> None:
    edit_config(dsa, OBEYED["yarn"])
    done = export(dsa, tmp_path / "onnx")
    assert drift(ours(OrtSession(done.folder, 1, threads=1)), expected(dsa)) < 1e-4
    assert json.loads((done.folder / EXPORT_MANIFEST).read_text())["model"]["context"] == 2048


@pytest.mark.parametrize(
    ("removed", "field", "value"),
    [("max_position_embeddings", "max_position_embeddings", 163840), ("n_routed_experts", "n_routed_experts", 8)],
    ids=["default-of-v32", "other-name"],
)
def test_what_deepseek_v32_reads_otherwise(removed: str, field: str, value: int, dsa: Path) -> None:
    """Its default context is another one, and it takes num_experts for n_routed_experts."""
    config = json.loads((dsa / "config.json").read_text())
    del config[removed]
    extra = {"num_experts": 8} if removed == "n_routed_experts" else {}
    (dsa / "config.json").write_text(json.dumps({**config, **extra}))
    assert dense_config(Checkpoint.open(dsa))[field] == value


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "indexer-layout": ({"indexer_rope_interleave": True}, ("indexer_rope_interleave is true", "half-split", "set it to false")),
    "rope-layout": ({"rope_interleave": False}, ("rope_interleave is False", "interleaved pairs", "remove it")),
    "model-type": ({"model_type": "glm_moe_dsa"}, ("model_type 'glm_moe_dsa'", "mla2dsa.json says deepseek_v32")),
    "back-to-dense": ({"model_type": "deepseek_v3"}, ("model_type 'deepseek_v3'", "says deepseek_v32")),
    "layer-types": ({"layer_types": ["full_attention", "indexed_attention"]}, ("layer_types has ['full_attention']",)),
    "mlp-bias": ({"mlp_bias": True}, ("mlp_bias is true",)),
    "index-heads": ({"index_n_heads": 8}, ("disagree with config.json", "indexer.wq_b.weight")),
    "fewer-layers": ({"num_hidden_layers": 1}, ("layers.1.", "num_hidden_layers is 1")),
    "wider": ({"v_head_dim": 8}, ("disagree with config.json", "o_proj.weight")),
    "tied": ({"tie_word_embeddings": True}, ("lm_head.weight differs from model.embed_tokens.weight",)),
    "no-topk": ({"index_topk": None}, ("index_topk is None",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_by_field(case: str, dsa: Path, tmp_path: Path) -> None:
    change, parts = REFUSED[case]
    edit_config(dsa, change)
    assert_refused(mla2dsa("export", dsa, tmp_path / "out"), 1, dsa, *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["yarn", "routed-scaling", "norm-eps"])
def test_verify_compares_two_of_a_kind(case: str, made: Path, dsa: Path) -> None:
    edit_config(dsa, OBEYED[case])
    done = mla2dsa("verify", made / "dense", dsa, "--sequence-length", 64, "--skip-transformers")
    field = next(iter(OBEYED[case]))
    assert_refused(done, 1, dsa / "config.json", field, made / "dense" / "config.json", "set both alike")


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": None},
        {"dtype": "float8_e4m3fn"},
        {"dtype": ["bfloat16"]},
    ],
    ids=str,
)
def test_verify_refuses_what_runtimes_would_load_otherwise(fields: dict[str, Any], made: Path, dsa: Path) -> None:
    edit_config(dsa, fields)
    done = mla2dsa("verify", made / "dense", dsa, "--sequences", 1, "--sequence-length", 32, "--skip-transformers")
    assert_refused(done, 1, dsa / "config.json", next(iter(fields)), "expected")
