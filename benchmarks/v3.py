"""DeepSeek-V3 at its published shape, FP8 blocks and all: how long `plan` takes, and a conversion of its first layers.

    python benchmarks/v3.py plan                      # 61 layers and the MTP layer, 163 files that are holes: nothing but headers
    python benchmarks/v3.py convert --layers 4        # three dense layers and one with 256 experts, random: 16 GB of files

A float32 layer of 256 experts is 45 GB: what `convert` keeps in memory of it is one expert. Transformers' model would need all of
them, so the conversion is verified on our graph alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 2**30
SHARDS = 163
BLOCK = 128
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16", "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "initializer_range": 0.02, "max_position_embeddings": 163840, "rope_theta": 10000, "use_cache": True,
    "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 4096},
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
}  # fmt: skip
NBYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
Spec = tuple[str, str, list[int]]  # name, dtype, shape


def tensors(layers: int, mtp: bool) -> Iterator[Spec]:
    """Of the published files, in their order."""
    yield "model.embed_tokens.weight", "BF16", [129280, 7168]
    for number in range(layers + mtp):
        yield from layer(f"model.layers.{number}", number < 3)
        if number == layers:
            yield f"model.layers.{number}.embed_tokens.weight", "BF16", [129280, 7168]
            yield f"model.layers.{number}.eh_proj.weight", "BF16", [7168, 14336]
            yield f"model.layers.{number}.shared_head.head.weight", "BF16", [129280, 7168]
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"model.layers.{number}.{norm}.weight", "BF16", [7168]
    yield "model.norm.weight", "BF16", [7168]
    yield "lm_head.weight", "BF16", [129280, 7168]


def layer(prefix: str, dense: bool) -> Iterator[Spec]:
    attention = {
        "q_a_proj": [1536, 7168], "q_b_proj": [24576, 1536], "kv_a_proj_with_mqa": [576, 7168], "kv_b_proj": [32768, 512],
        "o_proj": [7168, 16384],
    }  # fmt: skip
    for name, shape in attention.items():
        yield from linear(f"{prefix}.self_attn.{name}", shape)
    norms = {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
    for name, size in {**norms, "input_layernorm": 7168, "post_attention_layernorm": 7168}.items():
        yield f"{prefix}.{name}.weight", "BF16", [size]
    if dense:
        yield from mlp(f"{prefix}.mlp", 18432)
        return
    yield f"{prefix}.mlp.gate.weight", "BF16", [256, 7168]
    yield f"{prefix}.mlp.gate.e_score_correction_bias", "F32", [256]
    yield from mlp(f"{prefix}.mlp.shared_experts", 2048)
    for expert in range(256):
        yield from mlp(f"{prefix}.mlp.experts.{expert}", 2048)


def mlp(prefix: str, width: int) -> Iterator[Spec]:
    yield from linear(f"{prefix}.gate_proj", [width, 7168])
    yield from linear(f"{prefix}.up_proj", [width, 7168])
    yield from linear(f"{prefix}.down_proj", [7168, width])


def linear(prefix: str, shape: list[int]) -> Iterator[Spec]:
    yield f"{prefix}.weight", "F8_E4M3", shape
    yield f"{prefix}.weight_scale_inv", "F32", [-(-size // BLOCK) for size in shape]


def nbytes(spec: Spec) -> int:
    return math.prod(spec[2]) * NBYTES[spec[1]]


def write(folder: Path, layers: int, mtp: bool, values: Callable[[Spec], Tensor] | None) -> None:
    """A checkpoint. values: of its tensors; None: files are holes of the right size."""
    config = {**CONFIG, "num_hidden_layers": layers, "num_nextn_predict_layers": int(mtp)}
    (folder / "config.json").write_text(json.dumps(config))
    every = list(tensors(layers, mtp))
    most = sum(map(nbytes, every)) / min(SHARDS, max(1, len(every) // 8))
    shards: list[list[Spec]] = [[]]
    for spec in every:
        if shards[-1] and sum(map(nbytes, shards[-1])) + nbytes(spec) > most:
            shards.append([])
        shards[-1].append(spec)
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        index |= {spec[0]: name for spec in shard}
        write_shard(folder / name, shard, values)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_shard(file: Path, shard: list[Spec], values: Callable[[Spec], Tensor] | None) -> None:
    header, offset = {}, 0
    for spec in shard:
        header[spec[0]] = {"dtype": spec[1], "shape": spec[2], "data_offsets": [offset, offset + nbytes(spec)]}
        offset += nbytes(spec)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        if values is None:
            out.truncate(8 + len(text) + offset)
            return
        for spec in shard:
            out.write(values(spec).contiguous().flatten().view(torch.uint8).numpy().tobytes())


def random_values(spec: Spec) -> Tensor:
    """Weights of the size that keeps activations as they are; norms about one; scales that make them so."""
    name, dtype, shape = spec
    if name.endswith("_scale_inv"):
        return torch.full(shape, 7168**-0.5)
    if dtype == "F8_E4M3":
        return rolled(tuple(shape), name)
    if len(shape) == 1:
        return (torch.rand(shape) + (0.5 if "norm" in name else 0.0)).to(
            torch.bfloat16 if dtype == "BF16" else torch.float32
        )
    return (torch.randn(shape) * (1.0 if "embed" in name else shape[-1] ** -0.5)).bfloat16()


def without_transformers(needed: dict[str, Any]) -> float:
    """GiB of a conversion that is verified on our graph alone, by the JSON of its plan."""
    resources, here = needed["resources"], needed["here"]
    streaming = sum(resources["memory"].values())
    states = resources["memory"].get("hidden states", 0)
    return (here["peak_memory"] - max(streaming, states + resources["transformers"]) + streaming) / GIB


@cache
def drawn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn).view(torch.uint8).flatten()


def rolled(shape: tuple[int, ...], name: str) -> Tensor:
    """One random matrix of the shape, begun at another place for each name: eleven thousand million draws take minutes."""
    values = drawn(shape)
    return values.roll(zlib.crc32(name.encode()) % values.numel()).view(shape)


def plan(folder: Path, options: argparse.Namespace) -> None:
    write(folder, 61, mtp=True, values=None)
    for _ in range(options.repeats):
        started = time.perf_counter()
        run = [sys.executable, "-m", "mla2dsa", "plan", str(folder), "--json"]
        needed = json.loads(subprocess.run(run, check=True, capture_output=True).stdout)
        took = time.perf_counter() - started
        print(
            f"plan of 61 layers, {len(list(folder.glob('*.safetensors')))} files: {took:.1f} s; a conversion would take "
            f"{without_transformers(needed):.1f} GiB, {needed['here']['peak_memory'] / GIB:.0f} GiB where transformers compares",
            flush=True,
        )


def convert(folder: Path, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model, out = folder / "model", folder / "out"
    model.mkdir()
    write(model, options.layers, mtp=False, values=random_values)
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({
        "tokens": options.tokens, "sequence_length": options.sequence_length, "index_topk": options.index_topk,
        "indexer": "closed-form", "verify": {"sequences": 1, "max_loss_delta": 1e9},
    }))  # fmt: skip
    run = [sys.executable, "-m", "mla2dsa"]
    planned = subprocess.run([*run, "plan", model, "--recipe", recipe, "--json"], check=True, capture_output=True)
    needed = json.loads(planned.stdout)
    started = time.perf_counter()
    command = [*run, "convert", str(model), str(out), "--recipe", str(recipe), "--skip-transformers"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read().strip().splitlines()[-1:]
    _, status, used = os.wait4(process.pid, 0)
    experts = 256 * (options.layers - 3) * 3 * 2048 * 7168
    print(
        f"{options.layers} layers ({experts * 4 / GIB:.0f} GiB of experts in float32): predicted "
        f"{without_transformers(needed):.1f} GiB and {needed['here']['seconds']:.0f} s, measured "
        f"{used.ru_maxrss / 2**20:.1f} GiB and {time.perf_counter() - started:.0f} s, exit {os.waitstatus_to_exitcode(status)} "
        f"{' '.join(said)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plan", "convert"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--index-topk", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (plan if options.what == "plan" else convert)(Path(folder), options)


if __name__ == "__main__":
    main()
