"""How long find_mla and mla_to_dsa take, and how much memory, as a DeepSeek-V3 grows to its real size.

    python benchmarks/passes.py                          # a tiny model at 4 to 61 layers, then the real 671B config
    python benchmarks/passes.py --layers 4 8 --no-real   # a quick look
    python benchmarks/passes.py --attention sdpa eager   # other captures than the product's own

Every line is a fresh process, on one thread. Weights are never read: the captured program has meta tensors. `find` is
normalising the graph and find_mla; `convert` is all of mla_to_dsa, its own find included. RSS is the peak of the process,
before the passes and at the end.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

LAYERS = (4, 8, 16, 32, 61)
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096,
}  # fmt: skip
REAL = {"num_hidden_layers": 61, "max_position_embeddings": 163840, "num_mtp_layers": 0, "rope_parameters": YARN}
TINY = {
    **REAL, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds, graph nodes before and after, gigabytes."""

    model: str
    layers: int
    attention: str
    nodes: int
    nodes_after: int
    capture: float
    find: float
    convert: float
    rss_before: float
    rss: float


def measure(model: str, layers: int, attention: str, profile: str | None) -> Row:
    """Runs in its own process."""
    import torch
    import transformers

    from mla2dsa.kernels.spec import IndexerConfig
    from mla2dsa.optimizer.model.capture import capture
    from mla2dsa.passes.mla_to_dsa import mla_to_dsa, prepare

    torch.set_num_threads(1)
    options: dict[str, Any] = {**(REAL if model == "real" else TINY), "num_hidden_layers": layers}
    config = transformers.DeepseekV3Config(**options).to_dict()
    start = time.perf_counter()
    program = capture(config, attention, torch.bfloat16).program
    captured = time.perf_counter()
    before = peak_rss()
    found = prepare(program)[1]
    matched = time.perf_counter()
    if len(found.sites) != layers:
        raise SystemExit(f"{len(found.sites)} of {layers} layers found: {found.misses[:1]}")
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    converted = mla_to_dsa(program, IndexerConfig(2048, 64))
    done = time.perf_counter()
    if profile:
        profiler.disable()
        profiler.dump_stats(profile)
    sizes = len(program.graph.nodes), len(converted.program.graph.nodes)
    times = captured - start, matched - captured, done - matched
    return Row(model, layers, attention, *sizes, *times, before, peak_rss())


def peak_rss() -> float:
    """Gigabytes; the kernel counts kilobytes, on macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    cases = [("tiny", layers, attention) for attention in args.attention for layers in args.layers]
    cases += [] if args.no_real else [("real", REAL["num_hidden_layers"], attention) for attention in args.attention]
    for model, layers, attention in cases:
        command = [sys.executable, __file__, "--one", model, "--layers", str(layers), "--attention", attention]
        command += ["--profile", args.profile] if args.profile else []
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{model}, {layers} layers, {attention}: the process failed")
        yield Row(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS), help="of the tiny model")
    parser.add_argument("--attention", nargs="+", choices=("anchor", "sdpa", "eager"), default=["anchor"])
    parser.add_argument("--no-real", action="store_true", help="leave the 671B config out")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    parser.add_argument("--profile", metavar="FILE", help="write cProfile statistics of mla_to_dsa (of the last line)")
    parser.add_argument("--one", choices=("tiny", "real"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(asdict(measure(args.one, args.layers[0], args.attention[0], args.profile))))
        return
    if not args.json:
        print(f"{'model':6}{'layers':>7} {'attention':10}{'nodes':>7}{'after':>7}{'capture s':>11}{'find s':>8}{'convert s':>11}{'RSS before':>12}{'RSS GB':>8}")  # fmt: skip  # noqa: E501
    for row in rows(args):
        if args.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        sizes = f"{row.layers:7} {row.attention:10}{row.nodes:7}{row.nodes_after:7}"
        times = f"{row.capture:11.1f}{row.find:8.2f}{row.convert:11.2f}"
        print(f"{row.model:6}{sizes}{times}{row.rss_before:12.2f}{row.rss:8.2f}", flush=True)


if __name__ == "__main__":
    main()
