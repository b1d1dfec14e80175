"""mlx-lm runs what a conversion wrote, on a CPU: the same logits and the same greedy text as our graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SMALL_TOPK, mla2dsa, small_conversion
from places import TINY

mx = pytest.importorskip("mlx.core", reason="mlx has no wheel for this machine")
NEW = 12


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with the shared indexers, and lm_head written out since mlx-lm does not tie it."""
    out = tmp_path_factory.mktemp("mlx") / "dsa"
    indexers = ("--indexer", f"donor:{small_conversion(tmp_path_factory)}")
    done = mla2dsa("convert", TINY, out, *indexers, "--target", "mlx-lm", "--skip-verification", "--json")
    assert done.code == 0, done.err
    told = done.json()["plan"]["targets"]
    assert (told["mlx-lm"]["loads"], told["vllm"]["loads"]) == (True, False)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    return out


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return torch.tensor(model(mx.array([ids])).astype(mx.float32).tolist())[0]


def test_mlx_lm_computes_the_same(written: Path) -> None:
    from mlx_lm import load
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(str(written))[:2]
    model.set_dtype(mx.float32)
    ours = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32, attn_implementation="eager").eval()
    ids = tokenizer.encode((sorted((TINY / "held_out").iterdir())[0]).read_text())[200 : 200 + SMALL_TOPK]
    with torch.no_grad():
        expected = ours(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert (logits(model, ids) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert not torch.allclose(logits(model, ids[::-1]), expected, atol=1e-1)


def test_mlx_lm_writes_the_same_text(written: Path) -> None:
    from mlx_lm import load

    prompt = "def main():\n    "
    done = mla2dsa("generate", written, prompt, "--max-new-tokens", NEW, "--json")
    assert done.code == 0, done.err
    model, tokenizer = load(str(written))[:2]
    model.set_dtype(mx.float32)
    ids = tokenizer.encode(prompt)
    assert len(ids) + NEW <= SMALL_TOPK
    count = len(ids)
    for _ in range(NEW):
        ids.append(int(logits(model, ids)[-1].argmax()))
    assert done.json()["text"] == tokenizer.decode(ids[count:])
