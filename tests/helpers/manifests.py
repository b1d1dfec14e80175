"""Manifests that are whole, for folders that are not."""

from pathlib import Path
from typing import Any

from mla2dsa.files.digests import file_sha256

_HASH = "0" * 64
_OPEN = ["batch", "seq"]


def runnable() -> dict[str, Any]:
    """What an export's manifest and an engine's have in common, of a model with one layer and 11 words."""
    widths = {"index_key_0": 8, "latent_0": 6}
    caches = {name: ["batch", "cache_length", width] for name, width in widths.items()}
    parts = {
        name.removesuffix("_0"): {"input": f"past_{name}", "output": f"present_{name}", "width": width}
        for name, width in widths.items()
    }
    return {
        "format": 1,
        "dtype": "float32",
        "logits": "last",
        "inputs": [
            *({"name": name, "dtype": "int64", "shape": _OPEN} for name in ("input_ids", "position_ids", "slots")),
            {"name": "key_begin", "dtype": "int64", "shape": ["batch"]},
            *({"name": f"past_{name}", "dtype": "float32", "shape": shape} for name, shape in caches.items()),
            {"name": "last", "dtype": "int64", "shape": ["batch"]},
        ],
        "outputs": [
            {"name": "logits", "dtype": "float32", "shape": ["batch", 1, 11]},
            *({"name": f"present_{name}", "dtype": "float32", "shape": shape} for name, shape in caches.items()),
        ],
        "caches": [{"layer": "model.layers.0.self_attn", **parts}],
        "limits": {"max_batch": 1, "max_seq": 128},
        "model": {
            "model_type": "deepseek_v32", "vocab_size": 11, "num_hidden_layers": 1, "context": 1024, "bos_token_id": 0,
            "eos_token_id": [0, 1],
        },
        "indexer": {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "rope_interleave": False},
        "source": {"name": "dsa", "fingerprint": _HASH, "files": {}},
        "versions": {"mla2dsa": "0.1.0"},
    }  # fmt: skip


def engine_manifest(folder: Path, backend: str, version: str, sms: list[int]) -> dict[str, Any]:
    """Of a folder that has model.engine and libmla2dsa_trt.so, whatever is in them."""
    plan, library = folder / "model.engine", folder / "libmla2dsa_trt.so"
    sizes = {"batch": [1, 1, 1], "seq": [1, 128, 128], "cache_length": [128, 128, 128]}
    return {
        **runnable(),
        "backend": {"name": backend, "version": version},
        "sms": sms,
        "profiles": [{"name": "prefill", **sizes}, {"name": "decode", **sizes, "seq": [1, 1, 1]}],
        "ops": {"SparseMLA": {"nodes": 1, "programs": [_HASH], "kernels": [_HASH]}},
        "plugin": {"file": library.name, "sha256": file_sha256(library), "embedded": False},
        "engine": {"file": plan.name, "bytes": plan.stat().st_size, "sha256": file_sha256(plan)},
        "layers": {"total": 3, "plugin": 1},
    }
