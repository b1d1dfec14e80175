"""Prefill time and decode speed of one model in five runtimes, side by side in one run on this CPU, same weights.

    python benchmarks/serving.py                           # 1K, 4K, 8K and 16K tokens, float32
    python benchmarks/serving.py --length 8192 --only ours-torch ours-onnxruntime
    python benchmarks/serving.py --dtype bfloat16 --only dense v32 ours-torch

    dense              transformers' DeepseekV3ForCausalLM, sdpa, its own cache
    v32                transformers' DeepseekV32ForCausalLM, sdpa, its own cache
    v32-onnx           the same exported with transformers' OnnxExporter, in onnxruntime; that graph has no cache, so a
                       new token costs what the whole sequence costs
    ours-torch         `mla2dsa generate --runtime torch`: the converted graph with caches
    ours-onnxruntime   `mla2dsa export` and onnxruntime: the same graph as ONNX, prefilled in the same chunks

The model is random: DeepSeek-V2-Lite's attention (16 heads, kv_lora_rank 512) with a q latent, small feed-forward layers so that
attention is what is timed, index_topk 2048. Every measurement is a process of its own with a limit on its memory: what does not fit
is reported, not swapped. A decode step is timed after the prefill, with the whole context in the cache, the median of --tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONTENDERS = ("dense", "v32", "v32-onnx", "ours-torch", "ours-onnxruntime")
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": 512, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
TOPK = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[int], object]


def make_model(folder: Path, layers: int, index_heads: int, context: int, dtype: torch.dtype) -> None:
    """folder/dense and folder/dsa, the second with random indexers."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
    from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights

    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SIZES, num_hidden_layers=layers, first_k_dense_replace=layers, max_position_embeddings=context
    )
    DeepseekV3ForCausalLM(config).to(dtype).save_pretrained(folder / "dense")
    indexer = IndexerConfig(TOPK, index_heads)
    shapes = IndexerWeights.shapes(indexer, SIZES["hidden_size"], SIZES["q_lora_rank"])
    weights = {
        f"model.layers.{layer}.self_attn": IndexerWeights.from_tensors(
            {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}
        )
        for layer in range(layers)
    }
    write_dsa_checkpoint(folder / "dense", folder / "dsa", weights, indexer, manifest={}, dtype=dtype)


def export_both(folder: Path, contenders: list[str]) -> None:
    """The two ONNX models, made once."""
    if "ours-onnxruntime" in contenders:
        from mla2dsa.optimizer.export import export

        export(folder / "dsa", folder / "ours")
    if "v32-onnx" in contenders:
        for short in (True, False):
            export_v32(folder, short)


def export_v32(folder: Path, short: bool) -> None:
    """transformers' exporter decides between "all keys" and "the best 2048" when it traces: a graph for each."""
    from transformers import DeepseekV32ForCausalLM
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = DeepseekV32ForCausalLM.from_pretrained(folder / "dsa", attn_implementation="sdpa").eval()
    inputs = {"input_ids": torch.ones(1, 64 if short else TOPK + 64, dtype=torch.int64), "use_cache": False}
    config = OnnxConfig(dynamic=True, dynamic_shapes={"input_ids": {1: torch.export.Dim.AUTO}})
    OnnxExporter().export(model, inputs, config=config).save_pretrained(v32_folder(folder, short))


def v32_folder(folder: Path, short: bool) -> Path:
    return folder / ("v32-onnx-short" if short else "v32-onnx")


def transformers_runner(folder: Path, name: str) -> tuple[Step, Step]:
    import transformers

    kind, place = {"dense": ("DeepseekV3", "dense"), "v32": ("DeepseekV32", "dsa")}[name]
    model: Any = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(folder / place, attn_implementation="sdpa")
    model.eval()
    cache = transformers.DynamicCache(config=model.config)

    @torch.inference_mode()
    def feed(ids: torch.Tensor) -> object:
        return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    return lambda length: feed(prompt(length)), lambda _: feed(torch.ones(1, 1, dtype=torch.int64))


def exported_runner(folder: Path, length: int, threads: int) -> tuple[Step, Step]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    file = next(v32_folder(folder, length < TOPK).glob("*.onnx"))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def whole(length: int) -> object:
        return session.run(None, {name: prompt(length).numpy()})

    return whole, lambda position: whole(position + 1)


def our_runner(folder: Path, name: str, capacity: int, threads: int) -> tuple[Step, Step]:
    from mla2dsa.optimizer.model.cached_model import open_torch_session
    from mla2dsa.runtime.generation import prefill
    from mla2dsa.runtime.ort_session import OrtSession

    session: Any = (
        OrtSession(folder / "ours", 1, capacity, threads=threads)
        if name == "ours-onnxruntime"
        else open_torch_session(folder / "dsa", 1, capacity)
    )
    zero = torch.zeros(1, dtype=torch.int64)

    def decode(position: int) -> object:
        at = torch.tensor([[position]])
        return session.step(torch.ones(1, 1, dtype=torch.int64), at, at, zero, zero)

    return lambda length: prefill(session, prompt(length).tolist(), length), decode


def prompt(length: int) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))


def measure(folder: Path, name: str, length: int, tokens: int, threads: int) -> None:
    """One contender at one length, in this process; prints JSON."""
    torch.set_num_threads(threads)
    runners = {"dense": transformers_runner, "v32": transformers_runner}
    if name in runners:
        prefill, decode = runners[name](folder, name)
    elif name == "v32-onnx":
        prefill, decode = exported_runner(folder, length, threads)
    else:
        prefill, decode = our_runner(folder, name, length + tokens + 1, threads)
    start = time.perf_counter()
    prefill(length)
    seconds = time.perf_counter() - start
    steps = []
    for position in range(length, length + (1 if name == "v32-onnx" else tokens + 1)):
        start = time.perf_counter()
        decode(position)
        steps.append(time.perf_counter() - start)
    step = statistics.median(steps[1:] or steps)  # the first step may enlarge buffers
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"prefill_seconds": seconds, "tokens_per_second": 1 / step, "peak_bytes": peak}))


def row(args: argparse.Namespace, folder: Path, name: str, length: int) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--folder", str(folder), "--only", name, "--length", str(length),
        "--tokens", str(args.tokens), "--threads", str(args.threads),
    ]  # fmt: skip
    limit = int(args.memory_gb * 2**30)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    if done.returncode == 0:
        return {"contender": name, "length": length, **json.loads(done.stdout.splitlines()[-1])}
    reason = done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else f"exit code {done.returncode}"
    memory = any(
        word in done.stderr
        for word in ("can't allocate memory", "MemoryError", "bad allocation", "bad_alloc", "Failed to allocate")
    )
    return {
        "contender": name,
        "length": length,
        "failed": f"needs more than {args.memory_gb:g} GB" if memory else reason,
    }


def show(found: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    start = f"{found['length']:6d} {found['contender']:17}"
    if "failed" in found:
        return f"{start} {found['failed']}"
    figures = f"{found['prefill_seconds']:10.2f} {found['tokens_per_second']:10.2f} {found['peak_bytes'] / 1e9:8.1f}"
    if baseline is None or "failed" in baseline:
        return f"{start} {figures}"
    prefill = baseline["prefill_seconds"] / found["prefill_seconds"]
    decode = found["tokens_per_second"] / baseline["tokens_per_second"]
    return f"{start} {figures} {prefill:14.2f} {decode:13.2f}"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="onnxruntime has no bfloat16 on the CPU"
    )
    parser.add_argument("--index-heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16, help="decode steps timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-gb", type=float, default=20.0, help="of one process")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = options()
    if args.folder:
        measure(args.folder, args.only[0], args.length[0], args.tokens, args.threads)
        return
    about = {
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder, args.layers, args.index_heads, 2 * max(args.length), DTYPES[args.dtype])
        export_both(folder, args.only)
        if not args.json:
            print(
                ", ".join(f"{key} {value}" for key, value in about.items()),
                f"{args.dtype}, {args.layers} layers, {args.index_heads} index heads",
            )
            print(
                f"{'tokens':>6} {'':17} {'prefill s':>10} {'decode t/s':>10} {'peak GB':>8} {'prefill/dense':>14} {'decode/dense':>13}"
            )
        for length in args.length:
            baseline = None
            for name in args.only:
                rows.append(row(args, folder, name, length))
                baseline = rows[-1] if name == "dense" else baseline
                if not args.json:
                    print(show(rows[-1], baseline), flush=True)
    if args.json:
        print(json.dumps({"machine": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
