"""A weight that the graph would not read, or would misread, stops every command; what is known to be no part of the graph does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import copier, edit_config, random_indexers
from command_line import assert_refused, mla2dsa, quick_capture  # noqa: F401  (a fixture)
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.kernels.spec import IndexerConfig

pytestmark = pytest.mark.usefixtures("quick_capture")

Tensors = dict[str, Tensor]
FLAGS = ("--index-topk", 32, "--tokens", 1024)
INDEXER = IndexerConfig(index_topk=32, index_n_heads=4, index_head_dim=32)
EMBEDDING, HEAD, LAST = "model.embed_tokens.weight", "lm_head.weight", "model.layers.2."
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return copier(tmp_path / "models", tmp_path_factory)


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """Put `change`d tensors and config fields into a folder with a single weight file of that name or ours."""
    name = next(it for it in ("model.safetensors", "model-dense.safetensors") if (folder / it).is_file())
    tensors = {key: tensor.clone().contiguous() for key, tensor in change(load_file(folder / name)).items()}
    (folder / name).unlink()  # it may be a hard link
    save_file(tensors, folder / name, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        kept = {it: file for it, file in json.loads(index.read_text())["weight_map"].items() if file != name}
        index.write_text(json.dumps({"weight_map": kept | dict.fromkeys(tensors, name)}))
    edit_config(folder, config)
    return folder


def add(**extra: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **{name.replace("__", "."): tensor for name, tensor in extra.items()}}


def untie(factor: float) -> Callable[[Tensors], Tensors]:
    """A head of its own, `factor` times the embedding."""
    return lambda tensors: {**tensors, HEAD: tensors[EMBEDDING] * factor}


def int8(tensors: Tensors) -> Tensors:
    """Linear layers as INT8 with a scale per channel."""
    changed = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("_proj.weight") and "indexer" not in name:
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            changed[name] = (weight.float() / scale).round().to(torch.int8)
            changed[name.replace("weight", "weight_scale")] = scale
    return changed


def copied_layer(extra: Tensors) -> Callable[[Tensors], Tensors]:
    """Layer 2 again as layer 3, with `extra`."""

    def change(tensors: Tensors) -> Tensors:
        again = {
            name.replace(LAST, "model.layers.3."): tensor.clone() for name, tensor in tensors.items() if LAST in name
        }
        return {**tensors, **again, **extra}

    return change


ONES = torch.ones(64, 64).bfloat16()
BIAS = "model.layers.0.self_attn.q_a_proj.bias"
SCALE = "model.layers.0.self_attn.kv_b_proj.weight_scale_inv"
UNREAD: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], tuple[str, ...]]] = {
    "tied-but-other-head": (untie(1.5), {"tie_word_embeddings": True}, (f"{HEAD} differs from {EMBEDDING}", "to false")),
    "head-of-another-shape": (
        lambda t: {**t, HEAD: t[EMBEDDING][:100]}, {"tie_word_embeddings": True}, (f"{HEAD} differs from {EMBEDDING}",),
    ),
    "layer-cut-off": (lambda t: t, {"num_hidden_layers": 2, "first_k_dense_replace": 2}, (LAST, "no multi-token-prediction layer")),
    "bias-unsaid": (add(**{BIAS: torch.ones(48)}), {}, (BIAS, "attention_bias is False", "set it to what the weights have")),
    "scales-of-a-cast-weight": (add(**{SCALE: torch.ones(1, 1)}), {}, (f"{SCALE} scales", "which is BF16")),
    "scales-of-nothing": (add(**{"model.x.weight_scale_inv": ONES}), {}, ("model.x.weight_scale_inv scales model.x.weight", "not there")),
    "an-adapter": (add(**{"model.layers.0.self_attn.o_proj.lora_A.weight": ONES}), {}, ("lora_A.weight", "model of config.json reads it")),
    "an-extra-norm": (add(**{"model.layers.0.post_mlp_layernorm.weight": ONES}), {}, ("post_mlp_layernorm", "reads it")),
    "int8": (int8, {}, ("is I8", "INT8 with a weight_scale")),
    "stale-fp8": (lambda t: t, {"quantization_config": FP8}, ("quantization_config", "is stale", "--drop-stale-quantization")),
}  # fmt: skip
KNOWN: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "tied-and-the-same-head": (untie(1), {"tie_word_embeddings": True}),
    "multi-token-prediction": (copied_layer({"model.layers.3.eh_proj.weight": ONES}), {}),
    "rotary-table": (add(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}), {}),
    "cache-scales": (add(**{"model.layers.0.self_attn.k_scale": torch.ones(1)}), {}),
}


@pytest.mark.parametrize("case", UNREAD)
def test_convert_and_plan_refuse(case: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    change, config, parts = UNREAD[case]
    model = rewrite(copy("single"), change, **config)
    assert_refused(mla2dsa("convert", model, tmp_path / "dsa", *FLAGS, "--skip-transformers"), 1, model, *parts)
    assert_refused(mla2dsa("plan", model, "--index-topk", 32), 1, model, *parts)
    assert not (tmp_path / "dsa").exists()


@pytest.mark.parametrize("case", KNOWN)
def test_what_is_known_to_be_no_part_of_the_graph(case: str, copy: Callable[[str], Path]) -> None:
    change, config = KNOWN[case]
    done = mla2dsa("plan", rewrite(copy("single"), change, **config), "--index-topk", 32)
    assert done.code == 0, done.err


@pytest.fixture
def pair(copy: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """A dense checkpoint and a DSA checkpoint of it, which a test may change."""
    dense = copy("single")
    return dense, write_dsa_checkpoint(dense, tmp_path / "dsa", random_indexers(dense, INDEXER), INDEXER, manifest={})


MADE_BY_US = ("int8", "an-adapter", "scales-of-a-cast-weight", "stale-fp8", "bias-unsaid")


@pytest.mark.parametrize(
    ("case", "native"),
    [*((case, False) for case in MADE_BY_US), ("int8", True), ("an-adapter", True)],
    ids=lambda it: it if isinstance(it, str) else ("native" if it else "ours"),
)
def test_whatever_reads_a_dsa_checkpoint_refuses(
    case: str, native: bool, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    change, config, parts = UNREAD[case]
    dense, dsa = pair
    rewrite(dsa, change, **config)
    if native:
        (dsa / "mla2dsa.json").unlink()
    for arguments in (
        ("export", dsa, tmp_path / "out"),
        ("export", dsa, tmp_path / "out", "--format", "pt2"),
        ("generate", dsa, "x"),
        ("build", dsa, tmp_path / "out", "--onnx-only", "--sm", "90"),
        ("verify", dense, dsa, "--sequence-length", 64, "--skip-transformers"),
    ):
        assert_refused(mla2dsa(*arguments), 1, dsa, *parts)
    assert not (tmp_path / "out").exists()


def test_verify_refuses_the_dense_one_too(pair: tuple[Path, Path]) -> None:
    dense, dsa = pair
    rewrite(dense, int8)
    done = mla2dsa("verify", dense, dsa, "--sequence-length", 64, "--skip-transformers")
    assert_refused(done, 1, dense, *UNREAD["int8"][2])


def test_a_stale_field_is_dropped_on_request(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """With transformers' word on the result, which would fail to load it with the field."""
    model = rewrite(copy("single"), lambda tensors: tensors, quantization_config=FP8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sequence_length: 64\nverify: {sequences: 1, max_loss_delta: 9}\n")
    flags = ("--index-topk", 32, "--tokens", 1024, "--recipe", recipe, "--drop-stale-quantization", "--json")
    done = mla2dsa("convert", model, tmp_path / "dsa", *flags)
    assert done.code == 0, done.err
    assert len(done.json()["verification"]["checks"]) == 10
    written = json.loads((tmp_path / "dsa" / "config.json").read_text())
    assert "quantization_config" not in written
    assert done.json()["dropped_fields"] == ["quantization_config"]
    assert mla2dsa("strip", tmp_path / "dsa", tmp_path / "again").code == 0
    assert (tmp_path / "again" / "config.json").read_bytes() == (model / "config.json").read_bytes()
