"""Folds on headers alone: what they make of quantised tensors, and what they refuse; steps on tensors, there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mla2dsa.exporters.dsa.config import dsa_config
from mla2dsa.exporters.dsa.folding import derive, halves, pairs, undo
from mla2dsa.exporters.dsa.folds import BiasQuery, CannotFold, Folding, IdentityQuery, PermuteRope, Untie, bias_rank
from mla2dsa.exporters.dsa.layout import choose
from mla2dsa.exporters.dsa.steps import Derived, Fill, Interleave, InverseDiagonal, Pad, Times, derived_of
from mla2dsa.files.safetensors_index import TensorLocation
from mla2dsa.kernels.spec import IndexerConfig

ATTENTION = "model.layers.0.self_attn"
SIZES = {
    "num_attention_heads": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "kv_lora_rank": 512, "hidden_size": 256,
    "v_head_dim": 128, "num_hidden_layers": 1,
}  # fmt: skip


def located(**shapes: tuple[str, tuple[int, ...]]) -> dict[str, TensorLocation]:
    return {
        name.replace("__", "."): TensorLocation(Path("m.safetensors"), dtype, shape, 0, 0)
        for name, (dtype, shape) in shapes.items()
    }


def quantised(name: str, rows: int, columns: int) -> dict[str, TensorLocation]:
    place = TensorLocation(Path("m.safetensors"), "F8_E4M3", (rows, columns), 0, 0)
    scales = TensorLocation(Path("m.safetensors"), "F32", (-(-rows // 128), -(-columns // 128)), 0, 0)
    return {f"{ATTENTION}.{name}.weight": place, f"{ATTENTION}.{name}.weight_scale_inv": scales}


def test_rotary_rows_stay_in_their_fp8_blocks() -> None:
    """DeepSeek-V3's sizes: 64 rotary rows lie in one block of 128 in every head, so that the scales stay."""
    folding = Folding(quantised("q_b_proj", 4 * 192, 256) | quantised("kv_a_proj_with_mqa", 576, 256))
    PermuteRope().apply(SIZES, folding)
    assert {it.dtype for it in folding.derived.values()} == {"F8_E4M3"}
    assert len(folding.derived) == 2
    assert not folding.lost


@pytest.mark.parametrize(
    ("fold", "tensors", "part"),
    [
        (PermuteRope(), quantised("q_b_proj", 4 * 192, 256), "blocks this would tear apart"),
        (BiasQuery(), quantised("q_proj", 4 * 192, 256), "blocks this would tear apart"),
        (IdentityQuery(), {}, "no self_attn.q_proj.weight is stored"),
        (Untie(), {}, "model.embed_tokens.weight is not stored"),
        (Untie(lambda config: 2.0), located(lm_head__weight=("I8", (4, 4))), "which a factor cannot be folded into"),
    ],
    ids=["torn", "padded", "no-query", "no-embedding", "scaled"],
)
def test_what_cannot_be_folded(fold: Any, tensors: dict[str, TensorLocation], part: str) -> None:
    sizes = {**SIZES, "qk_nope_head_dim": 96, "qk_rope_head_dim": 96}
    with pytest.raises(CannotFold, match=part):
        fold.apply(sizes, Folding(tensors))


def test_a_quantised_query_projection_takes_the_identity_alone() -> None:
    """Renamed with its scales; what is new beside it is plain, and the quantisation is told so."""
    gain = {"model.layers.0.input_layernorm.weight": TensorLocation(Path("m.safetensors"), "BF16", (256,), 0, 0)}
    tensors = quantised("q_proj", 4 * 192, 256) | quantised("kv_a_proj_with_mqa", 576, 256) | gain
    config = {**SIZES, "model_type": "deepseek_v3", "q_lora_rank": None, "quantization_config": {"quant_method": "fp8"}}
    layout = choose(config, tensors)
    assert layout.forms == ("identity",)
    derived = layout.folding(config, tensors).derived
    assert {name.removeprefix(f"{ATTENTION}."): it.dtype for name, it in derived.items()} == {
        "q_b_proj.weight": "F8_E4M3", "q_b_proj.weight_scale_inv": "F32", "q_a_proj.weight": "F32", "q_a_layernorm.weight": "BF16",
    }  # fmt: skip
    made = dsa_config(config, IndexerConfig(8, 4), [ATTENTION], layout, plain=[f"{ATTENTION}.q_a_proj"])
    assert f"{ATTENTION}.q_a_proj" in made["quantization_config"]["modules_to_not_convert"]
    assert made["q_lora_rank"] == 256


@pytest.mark.parametrize("width", [3, 4, 15, 16, 63, 64, 2048])
def test_the_rank_has_a_whole_root(width: int) -> None:
    rank = bias_rank(width)
    assert rank > width
    assert rank <= 4 * width
    assert (rank**0.5).is_integer()
    assert int(rank**0.5) & (int(rank**0.5) - 1) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
def test_halves_become_pairs_and_back(dtype: torch.dtype, blocks: int) -> None:
    tensor = torch.arange(blocks * 10 * 2).float().view(-1, 2).to(dtype)
    at = Interleave(blocks, 3, 6)
    found = pairs(tensor, at)
    expected = tensor.float().view(blocks, 10, 2)[:, [0, 1, 2, 3, 6, 4, 7, 5, 8, 9]].reshape(-1, 2)
    assert torch.equal(found.float(), expected)
    assert torch.equal(halves(found, at).float(), tensor.float())


def test_exact_steps_are_taken_back() -> None:
    made = Derived("b", "a", "BF16", (12, 4), (Pad(2, 4), Interleave(2, 2, 4)))
    source = torch.randn(12, 2).bfloat16()
    assert made.is_exact
    assert torch.equal(undo(made, derive(made, source)), source)
    assert derived_of(made.to_json()) == made


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Times(1.5), [3.0, 6.0]),
        (InverseDiagonal(), [[0.5, 0.0], [0.0, 0.25]]),
        (Fill(7.0), [7.0, 7.0]),
        (Fill(7.0, only=1), [0.0, 7.0]),
        (Fill(7.0, diagonal=True), [[7.0, 0.0], [0.0, 7.0]]),
    ],
    ids=lambda it: type(it).__name__,
)
def test_steps_that_make_other_values(step: Any, expected: list[Any]) -> None:
    shape = tuple(torch.tensor(expected).shape)
    made = Derived("b", "a", "F32", shape, (step,))
    assert derive(made, torch.tensor([2.0, 4.0])).tolist() == expected
    assert not made.is_exact
    assert derived_of(made.to_json()) == made
    with pytest.raises(ValueError, match="cannot be taken back"):
        undo(made, torch.zeros(shape))
