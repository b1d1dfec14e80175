"""Checkpoints whose language model is a part of them: that part is converted, the rest travels along untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_config
from families import build, indexer_weights
from safetensors.torch import load_file, save_file

from mla2dsa.errors import UserError
from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.exporters.dsa.strip import strip
from mla2dsa.files.json_files import read_json
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.model.cached_model import open_torch_session
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.plan import prepare
from mla2dsa.optimizer.proof.pair import open_pair
from mla2dsa.optimizer.recipe import Recipe
from mla2dsa.optimizer.verify import _against_transformers
from mla2dsa.runtime.generation import prefill

INDEXER = IndexerConfig(index_topk=48, index_n_heads=4, index_head_dim=16)
IDS = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(1))
PREFIXES = {"before": "language_model.", "inside": "model.language_model."}
# (family, model_type of its text_config, of the whole, where the prefix is)
CASES = {
    "kimi_k25": ("deepseek_v3", "kimi_k2", "kimi_k25", "before"),
    "mistral3": ("mistral4", "mistral4", "mistral3", "before"),
    "mistral3-by-transformers": ("mistral4", "mistral4", "mistral3", "inside"),
}


def wrapped(folder: Path, name: str) -> Any:
    """Saves a model inside a wrapper, with vision tensors; returns it."""
    family, inner, outer, where = CASES[name]
    model = build(family)
    model.save_pretrained(folder)  # type: ignore[operator]
    text = {**read_json(folder / "config.json"), "model_type": inner}
    text.pop("architectures")
    config = {
        "model_type": outer,
        "architectures": ["ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    prefix = PREFIXES[where]
    inside = {prefix + it.removeprefix("model." if where == "inside" and it.startswith("model.") else "") if where == "before"
              or it.startswith("model.") else it: value for it, value in tensors.items()}  # fmt: skip
    save_file({**inside, "vision_tower.patch.weight": torch.ones(2, 2)}, folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path, Any]:
    """(case, wrapper, DSA checkpoint, dense text model)."""
    model = wrapped(tmp_path / "dense", request.param)
    weights = {f"model.layers.{layer}.self_attn": indexer_weights(INDEXER, 64, 48, layer) for layer in range(2)}
    out = write_dsa_checkpoint(tmp_path / "dense", tmp_path / "dsa", weights, INDEXER, manifest={}, dtype=torch.float32)
    return request.param, tmp_path / "dense", out, model


def test_a_wrapper_is_converted_proved_run_and_stripped(made: tuple[str, Path, Path, Any], tmp_path: Path) -> None:
    name, source, out, model = made
    config, checkpoint = read_json(out / "config.json"), Checkpoint.open(out)
    assert "index_topk" not in config
    assert config["text_config"]["index_topk"] == INDEXER.index_topk
    assert config["model_type"] == CASES[name][2]
    added = [it for it in checkpoint.whole_tensors if ".indexer." in it]
    assert len(added) == 10
    assert {it.partition("layers.")[0] for it in added} == {
        "language_model.model." if CASES[name][3] == "before" else "model.language_model."
    }
    assert "vision_tower.patch.weight" in checkpoint.whole_tensors
    assert "vision_tower.patch.weight" not in checkpoint.tensors
    checks = _against_transformers(open_pair(source, out), [IDS[0]])
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 3
    short = IDS[:, :40]
    with torch.no_grad():
        expected = model(short, use_cache=False).logits[:, -1]
    found = prefill(open_torch_session(out, 1), [short[0].tolist()], 40)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    strip(out, tmp_path / "stripped")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "stripped" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("made", ["kimi_k25"], indirect=True)
def test_a_key_that_the_dense_model_misses_fails(
    made: tuple[str, Path, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would fill it with random numbers: it is told of no prefix here."""
    from mla2dsa.optimizer.proof import streamed_model

    _, source, out, _ = made
    monkeypatch.setattr(streamed_model, "PREFIXES", {})
    checks = _against_transformers(open_pair(source, out), [IDS[0]])
    assert not checks[-1].passed
    assert "missing keys" in checks[-1].detail


def test_a_plan_says_why_the_layout_is_own(tmp_path: Path) -> None:
    wrapped(tmp_path / "dense", "kimi_k25")
    plan = prepare(str(tmp_path / "dense"), Recipe(index_topk=48, index_n_heads=4, index_head_dim=16)).plan
    assert (plan.layout, plan.refusal) == ("own", None)
    assert "kimi_k25 is a wrapper" in plan.layout_reason


def test_a_part_that_is_not_known_is_named(tmp_path: Path) -> None:
    wrapped(tmp_path / "dense", "kimi_k25")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    save_file({**tensors, "mystery.weight": torch.ones(2)}, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"mystery.weight: stored, but nothing"):
        prepare(str(tmp_path / "dense"), Recipe(index_topk=48, index_n_heads=4, index_head_dim=16))


def test_other_names_of_deepseek_v3(tmp_path: Path) -> None:
    """kimi_k2, sarvam_mla: transformers has no such type, but the model."""
    build("deepseek_v3").save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    for name in ("kimi_k2", "sarvam_mla"):
        edit_config(tmp_path / "dense", {"model_type": name})
        plan = prepare(str(tmp_path / "dense"), Recipe(index_topk=48, index_n_heads=4, index_head_dim=16)).plan
        assert (plan.layout, plan.model_type) == ("deepseek_v32", name)
