"""How export scales: seconds, peak memory and bytes written, by number of layers, on checkpoints of any size.

    python benchmarks/export.py                      4 to 61 small layers
    python benchmarks/export.py --v3 --layers 61     the real DeepSeek-V3.2 sizes (1.3 TB in bfloat16)

Checkpoints are sparse files: right headers, no data on disk. That an export does not read the weights is what makes it work.
Every measurement is a process of its own, as peak memory is kept per process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 192, "intermediate_size": 512, "moe_intermediate_size": 64, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
    "kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "max_position_embeddings": 4096, "index_topk": 64, "index_n_heads": 16, "index_head_dim": 64,
}  # fmt: skip
V3: dict[str, Any] = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_attention_heads": 128,
    "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "max_position_embeddings": 163840, "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128,
}  # fmt: skip


def config(sizes: dict[str, Any], layers: int) -> dict[str, Any]:
    return {
        **sizes, "model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"], "num_hidden_layers": layers,
        "first_k_dense_replace": min(3, layers), "tie_word_embeddings": False, "indexer_rope_interleave": False,
    }  # fmt: skip


def tensor_shapes(c: dict[str, Any]) -> dict[str, list[int]]:
    """Name and shape of every tensor of a deepseek_v32 checkpoint."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    query, key = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["qk_nope_head_dim"] + c["v_head_dim"]
    index = c["index_n_heads"] * c["index_head_dim"]
    attention = {
        "q_a_proj.weight": [c["q_lora_rank"], hidden], "q_a_layernorm.weight": [c["q_lora_rank"]],
        "q_b_proj.weight": [heads * query, c["q_lora_rank"]], "kv_a_layernorm.weight": [c["kv_lora_rank"]],
        "kv_a_proj_with_mqa.weight": [c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden],
        "kv_b_proj.weight": [heads * key, c["kv_lora_rank"]], "o_proj.weight": [hidden, heads * c["v_head_dim"]],
        "indexer.wq_b.weight": [index, c["q_lora_rank"]], "indexer.wk.weight": [c["index_head_dim"], hidden],
        "indexer.k_norm.weight": [c["index_head_dim"]], "indexer.k_norm.bias": [c["index_head_dim"]],
        "indexer.weights_proj.weight": [c["index_n_heads"], hidden],
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [c["vocab_size"], hidden], "lm_head.weight": [c["vocab_size"], hidden]}
    shapes["model.norm.weight"] = [hidden]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}{n}.weight": [hidden] for n in ("input_layernorm", "post_attention_layernorm")}
        if layer < c["first_k_dense_replace"]:
            shapes |= mlp(f"{prefix}mlp.", hidden, c["intermediate_size"])
            continue
        shapes[f"{prefix}mlp.gate.weight"] = [c["n_routed_experts"], hidden]
        shapes[f"{prefix}mlp.gate.e_score_correction_bias"] = [c["n_routed_experts"]]
        for expert in ["shared_experts", *(f"experts.{e}" for e in range(c["n_routed_experts"]))]:
            shapes |= mlp(f"{prefix}mlp.{expert}.", hidden, c["moe_intermediate_size"])
    return shapes


def mlp(prefix: str, hidden: int, inner: int) -> dict[str, list[int]]:
    up = {f"{prefix}{name}.weight": [inner, hidden] for name in ("gate_proj", "up_proj")}
    return {**up, f"{prefix}down_proj.weight": [hidden, inner]}


def sparse_checkpoint(folder: Path, sizes: dict[str, Any], layers: int) -> int:
    """Write one; returns the bytes its weights would take."""
    from mla2dsa.files.safetensors_index import header_bytes

    folder.mkdir()
    made = config(sizes, layers)
    (folder / "config.json").write_text(json.dumps(made))
    shapes = dict(sorted(tensor_shapes(made).items()))
    header = header_bytes({name: ("BF16", tuple(shape)) for name, shape in shapes.items()}, {"format": "pt"})
    size = 0
    for shape in shapes.values():
        size += 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    return size


def measure(folder: Path, out: Path, dtype: str) -> None:
    """One export, in this process; prints seconds, peak memory and the manifest's account as JSON."""
    import torch

    from mla2dsa.optimizer.export import export

    torch.set_num_threads(2)
    start = time.monotonic()
    weights = export(folder, out, dtype=dtype).manifest["weights"]
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = (out / "model.onnx").stat().st_size
    print(json.dumps({"seconds": seconds, "peak": peak, "model": model, "written": weights["written_bytes"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32, 61])
    parser.add_argument("--v3", action="store_true", help="DeepSeek-V3.2's real sizes")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--one", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(*args.one, args.dtype)
        return
    print(f"{'layers':>6} {'weights GB':>10} {'seconds':>8} {'peak GB':>8} {'model MB':>8} {'written MB':>10}")
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as place:
            size = sparse_checkpoint(Path(place, "checkpoint"), V3 if args.v3 else SMALL, layers)
            command = [sys.executable, __file__, "--one", f"{place}/checkpoint", f"{place}/out", "--dtype", args.dtype]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            m = json.loads(done.stdout.splitlines()[-1])
        columns = f"{m['seconds']:8.1f} {m['peak'] / 1e9:8.2f} {m['model'] / 1e6:8.2f} {m['written'] / 1e6:10.2f}"
        print(f"{layers:6} {size / 1e9:10.2f} {columns}", flush=True)


if __name__ == "__main__":
    main()
