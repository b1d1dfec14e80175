"""inspect: what a checkpoint, an exported folder or an ONNX file is: layers, ops, caches, bytes. Reads headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.manifests.checkpoint_manifest import is_converted, read_checkpoint_manifest
from ..files.manifests.engine_manifest import engine_folder, read_engine
from ..files.manifests.export_manifest import is_export, read_export
from ..files.onnx_file import external_bytes, parse_onnx, read_onnx
from .model.checkpoint import Checkpoint
from .model.stored_formats import mtp_tensors

_CONFIG = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "index_topk", "index_n_heads",
    "index_head_dim", "scoring_func", "topk_method",
)  # fmt: skip


def inspect(target: str) -> dict[str, Any]:
    """A description of `target`: {"kind": "checkpoint" | "export" | "engine" | "onnx", ...}. Raises UserError when it is none."""
    path = Path(target)
    if path.is_file() and path.suffix == ".onnx":
        return {"kind": "onnx", "file": str(path), **_onnx(path)}
    engine = engine_folder(path)
    if engine is not None:
        return {"kind": "engine", "folder": str(engine), **read_engine(engine)}
    if is_export(path):
        return _export(path)
    if path.is_file():
        raise UserError(
            f"{path}: neither an .onnx file nor a folder; give a checkpoint, an exported folder or an .onnx file"
        )
    return _checkpoint(target)


def _checkpoint(target: str) -> dict[str, Any]:
    checkpoint = Checkpoint.open(target)
    indexers = [name for name in checkpoint.tensors if ".indexer." in name]
    mtp = mtp_tensors(checkpoint.config, checkpoint.tensors)
    keyed = {name.partition(".indexer.")[0] for name in indexers if name not in mtp}
    total = sum(place.nbytes for place in checkpoint.tensors.values())
    found: dict[str, Any] = {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "attention": "DSA" if checkpoint.is_dsa() else "dense",
        "config": {name: checkpoint.config[name] for name in _CONFIG if checkpoint.config.get(name) is not None},
        "tensors": len(checkpoint.tensors),
        "bytes": total,
        "dtypes": dict(Counter(place.dtype for place in checkpoint.tensors.values())),
        "indexer_layers": len({name.partition(".indexer.")[0] for name in indexers}),
        "indexer_bytes": sum(checkpoint.tensors[name].nbytes for name in indexers),
        "mtp_tensors": len(mtp),
        "cache_bytes_per_token": _cache_bytes(checkpoint.config, len(keyed)),
    }
    if is_converted(checkpoint.path):
        manifest = read_checkpoint_manifest(checkpoint.path)
        layout = manifest.get("layout") or {}
        found["made_by_mla2dsa"] = {
            "versions": manifest.get("versions"), "verified": manifest.get("verified"), "layout": layout.get("name"),
            "because": layout.get("why"), "query_form": layout.get("query_form"), "folded_tensors": len(layout.get("derived", ())),
        }  # fmt: skip
    return found


def _cache_bytes(config: Mapping[str, Any], keyed: int) -> dict[str, int]:
    """bfloat16 bytes of one token in all layers: the latent, and the index key in the `keyed` layers that have an indexer."""
    layers, rank, rope = (
        int(config.get(name) or 0) for name in ("num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim")
    )
    return {"latent": 2 * layers * (rank + rope), "index_key": 2 * keyed * int(config.get("index_head_dim") or 0)}


def _export(path: Path) -> dict[str, Any]:
    manifest = read_export(path)
    keys = ("kind", "file", "dtype", "runs_on", "logits", "limits", "model", "indexer", "source", "weights", "versions")
    found: dict[str, Any] = {name: manifest[name] for name in keys if name in manifest}
    found["export"] = found.pop("kind", None)
    caches = manifest.get("caches", [])
    row = sum(int(cache[part]["width"]) for cache in caches for part in ("latent", "index_key") if cache[part])
    found |= {"kind": "export", "path": str(path), "layers": len(caches), "cache_values_per_token": row}
    if manifest.get("kind") == "onnx":
        found["graph"] = _onnx(path / manifest["file"])
    return found


def _onnx(file: Path) -> dict[str, Any]:
    """Ops and weights of an ONNX file; external data is counted from its offsets, not read."""
    model = parse_onnx(file, read_onnx(file))
    nodes = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    external = external_bytes(file, model)
    inside = sum(len(tensor.raw_data) for tensor in model.graph.initializer if not tensor.external_data)
    missing = sorted(name for name in external if not (file.parent / name).is_file())
    return {
        "nodes": len(model.graph.node),
        "dsa_ops": {name: count for name, count in nodes.items() if name.startswith("mla2dsa.")},
        "functions": sorted(f"{function.domain}.{function.name}" for function in model.functions),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [value.name for value in model.graph.input],
        "outputs": [value.name for value in model.graph.output],
        "weight_bytes": {"inside": inside, **external},
        "missing_files": missing,
    }
