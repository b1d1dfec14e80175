"""Small deepseek_v3 checkpoints on disk, written by transformers, and indexers to go with them."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights

INDEXER = IndexerConfig(index_topk=64, index_n_heads=4, index_head_dim=32)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "single": {},
    "sharded": {"max_shard_size": "100KB", "rope_parameters": YARN},
    "moe": {"first_k_dense_replace": 1},
    "moe-sharded": {"first_k_dense_replace": 1, "max_shard_size": "100KB", "tie_word_embeddings": True},
}
_MADE: dict[str, Path] = {}


def dense_checkpoint(kind: str, factory: pytest.TempPathFactory) -> Path:
    """The folder of a three-layer deepseek_v3 model (see KINDS), made once per session: only read it."""
    if kind not in _MADE:
        folder = factory.mktemp("dense") / kind
        save_dense(folder, **KINDS[kind])
        _MADE[kind] = folder
    return _MADE[kind]


def save_dense(folder: Path, *, max_shard_size: str = "50GB", seed: int = 0, **fields: Any) -> None:
    """Save a random model with these config fields, with a tokenizer file and a subfolder as published ones have."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
    }
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**sizes, **fields})).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "figures").mkdir()
    (folder / "figures" / "speed.txt").write_bytes(b"fast\r\n")


def random_indexers(folder: Path, config: IndexerConfig = INDEXER, seed: int = 1) -> dict[str, IndexerWeights]:
    """Random float32 indexers for every layer of the model in `folder`."""
    dense = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    shapes = IndexerWeights.shapes(config, dense["hidden_size"], dense["q_lora_rank"])
    return {
        f"model.layers.{layer}.self_attn": IndexerWeights.from_tensors(
            {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        )
        for layer in range(dense["num_hidden_layers"])
    }


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def edit_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Set fields of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def write_raw(file: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def shards(folder: Path) -> list[Path]:
    """The shard files, in order."""
    return sorted(folder.glob("model-*.safetensors"))


def copier(tmp_path: Path, factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes copies of `dense_checkpoint` that a test may damage."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(dense_checkpoint(kind, factory), tmp_path / kind))

    return copy


def assert_one_line(error: pytest.ExceptionInfo[UserError], *parts: object) -> None:
    """The message is one line and names all `parts`."""
    assert len(str(error.value).splitlines()) == 1
    for part in parts:
        assert str(part) in str(error.value)


class Interrupting(dict[str, IndexerWeights]):
    """Indexers that do something when the second is fetched: shards are linked by then, the new one is half written."""

    def __init__(self, weights: dict[str, IndexerWeights], action: Callable[[], object]) -> None:
        super().__init__(weights)
        self.action = action

    def __getitem__(self, name: str) -> IndexerWeights:
        if name.startswith("model.layers.1."):
            self.action()
        return super().__getitem__(name)
