"""Predicted against measured memory and time of whole conversions, on random models with heads as wide as DeepSeek-V3's.

    python benchmarks/memory.py                        # 64 and 128 heads with defaults: hours on two cores
    python benchmarks/memory.py --heads 64 --tokens 16384 --verify 1    # the same memory, fewer sequences
    python benchmarks/memory.py --youtu --tokens 2048 --sequence-length 1024 --index-topk 256 --verify 1
    python benchmarks/memory.py --stream --sequence-length 32768    # one sequence through one layer, dense and sparse
    python benchmarks/memory.py --rows                 # the sizes of tiles: time and memory of attention at other values

The models have few and narrow layers: what is large in them is attention, which grows with heads and tokens. Every conversion runs
in a process of its own, whose peak is what the system says (the largest resident set, with what it maps of files).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 2**30


def make(folder: Path, heads: int, layers: int, context: int) -> None:
    """A random DeepseekV3ForCausalLM with V3's head widths."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=1024, hidden_size=512, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, n_shared_experts=1, n_routed_experts=8, kv_lora_rank=512,
        q_lora_rank=256, qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=context, rope_theta=10000.0,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)


def make_youtu(folder: Path, layers: int) -> None:
    """A random YoutuForCausalLM of Youtu-LLM-2B's shape, bfloat16: 1.96 billion parameters with its 32 layers."""
    import torch
    from transformers import YoutuConfig, YoutuForCausalLM

    torch.manual_seed(0)
    config = YoutuConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128,
        max_position_embeddings=131072, rope_theta=1600000.0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = YoutuForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def convert(model: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one conversion: predicted by its plan, and measured."""
    fields: dict[str, Any] = {"verify": {"sequences": options.verify, "max_loss_delta": 1e9}}
    fields |= {
        name: value
        for name in ("tokens", "sequence_length", "index_topk")
        if (value := getattr(options, name)) is not None
    }
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(json.dumps(fields))
    run = [sys.executable, "-m", "mla2dsa"]
    plan = json.loads(
        subprocess.run([*run, "plan", model, "--recipe", recipe, "--json"], check=True, capture_output=True).stdout
    )
    started = time.perf_counter()
    command = [*run, "convert", str(model), str(out), "--recipe", str(recipe), "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    return {
        **plan["resources"], **plan["here"], "measured_peak": used.ru_maxrss * 1024, "measured_seconds": time.perf_counter() - started,
        "exit": os.waitstatus_to_exitcode(status), "said": said.strip().splitlines()[-1:],
    }  # fmt: skip


def runner_of(folder: Path, kind: str, rows: int) -> tuple[Any, list[str]]:
    """A model's program, `dense` with what calibration looks at or `sparse` with random indexers, and the nodes that are looked at."""
    from mla2dsa.kernels.spec import IndexerConfig
    from mla2dsa.optimizer.indexer.indexer_math import random_indexer
    from mla2dsa.optimizer.model.capture import capture
    from mla2dsa.optimizer.model.checkpoint import Checkpoint
    from mla2dsa.optimizer.model.weights import WeightSource
    from mla2dsa.optimizer.share.programs import sharing_runner
    from mla2dsa.passes.tap import tap
    from mla2dsa.runtime.execute import PieceRunner
    from mla2dsa.runtime.shelf import Shelf

    source = WeightSource(Checkpoint.open(folder), capture(json.loads((folder / "config.json").read_text())))
    tapped, config = tap(source.capture.program, rows), IndexerConfig(2048, 64, 128)
    sites = tapped.found.sites
    if kind == "dense":
        load, cores = source.loader(tapped.program), [site.core.out.name for site in sites]
        watched = [node for name, node in tapped.taps.items() if not name.endswith(".attention")]
        return PieceRunner(tapped.program, load, cores, shelf=Shelf()), watched
    weights = {site.name: random_indexer(config, site.dims.hidden_size, site.dims.q_width) for site in sites}
    return sharing_runner(source, weights, config, False, Shelf()), []


def stream(folder: Path, kind: str, length: int) -> dict[str, float]:
    """Bytes of this process at the worst moment, predicted and measured, of one sequence in `runner_of`. Seconds."""
    import resource

    import torch

    from mla2dsa.optimizer.before.resources import resident
    from mla2dsa.optimizer.proof.evaluate import program_inputs
    from mla2dsa.passes.tap import ROWS_INPUT
    from mla2dsa.runtime.footprint import Footprints

    rows = 128
    runner, watched = runner_of(folder, kind, rows)
    given = program_inputs(torch.arange(length) % 1024)
    given |= {ROWS_INPUT: torch.arange(length - rows, length)} if watched else {}
    pieces = Footprints(runner, watched, late=True).at(length)
    worst = max(piece.weights + piece.peak for piece in pieces[: runner.until(watched or runner.outputs)])
    predicted, started = resident() + worst, time.perf_counter()
    for seen in runner.run([given], watched or None, late=True):
        del seen
    measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"predicted": predicted, "measured": measured, "seconds": time.perf_counter() - started}


def streams(heads: list[int], length: int) -> None:
    for count in heads:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count, 1, length)
            for kind in ("dense", "sparse"):
                command = [sys.executable, __file__, "--streamed", kind, folder, "--sequence-length", str(length)]
                found = json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                )
                print(
                    f"{count} heads, {length} tokens, one layer {kind}: predicted {found['predicted'] / GIB:.2f} GiB, "
                    f"measured {found['measured'] / GIB:.2f} GiB, {found['seconds']:.0f} s",
                    flush=True,
                )


def rows() -> None:
    """Seconds of dense and sparse attention and the oracle's selection, by the queries of a tile; of distributions, by positions."""
    import torch

    from mla2dsa.kernels import anchors
    from mla2dsa.optimizer.proof import baselines, figures
    from mla2dsa.runtime.tiled import queries

    q, k, v = (torch.randn(1, 16, 4096, width) for width in (192, 192, 128))
    mask = torch.ones(4096, 4096, dtype=torch.bool).tril()[None, None]
    query, kv = torch.randn(1, 2048, 16, 576), torch.randn(1, 2048, 576)
    indices = torch.zeros(1, 2048, 512, dtype=torch.int32)
    attention: Any = SimpleNamespace(args=("rows", "kv", "indices", 0.1, 512))
    chain: Any = SimpleNamespace(
        q_nope="nope", q_rope="rope", key_up="up", value_up="out", attention=attention, queries={}, width=3 * 512 + 64
    )
    env: Any = {
        "nope": torch.randn(1, 16, 2048, 128), "rope": torch.randn(1, 16, 2048, 64), "up": torch.randn(16, 128, 512),
        "out": torch.randn(16, 512, 128), "kv": kv, "indices": indices,
    }  # fmt: skip
    logits, targets = torch.randn(2048, 32768), torch.zeros(2048, dtype=torch.int64)
    for size in (64, 256, 512, 1024, 2048):
        anchors.QUERY_ROWS = baselines.QUERY_ROWS = figures.POSITIONS = size
        queries.tile_rows = lambda *_, size=size: size  # type: ignore[assignment]
        calls = {
            "sparse attention": lambda: queries.run(chain, env, lambda _, given, __: queries.SPARSE_MLA(*given)),
            "dense attention": lambda: anchors.dense_attention(q, k, v, mask, 0.1),
            "oracle": lambda: baselines.oracle(query, kv, indices, 0.1, 512),
            "distributions": lambda: [
                figures.Tally().add(*[figures.log_probabilities(logits[part])] * 2, targets[part])
                for part in figures.blocks(0, len(targets))
            ],
        }
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            print(f"{name:16} {size:5} rows  {time.perf_counter() - started:6.2f} s", flush=True)


def heads_of_a_group() -> None:
    """Seconds of a layer's dense attention and what leads to it, by the bytes of the heads that are run at once."""
    import torch

    from mla2dsa.optimizer.model.capture import capture
    from mla2dsa.runtime.execute import PieceRunner
    from mla2dsa.runtime.tiled import heads

    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), heads=64, layers=1, context=4096)
        program = capture(json.loads((Path(scratch) / "config.json").read_text())).program
    weights = {name: torch.randn(*tensor.shape) * 0.02 for name, tensor in program.state_dict.items()}
    buffers = {name: torch.ones(tensor.shape) for name, tensor in program.named_buffers()}
    given = {"input_ids": torch.arange(4096)[None] % 1024, "attention_mask": torch.ones(1, 4096, dtype=torch.int64)}
    given |= {"position_ids": torch.arange(4096)[None]}
    cores = [node.name for node in program.graph.nodes if node.target is heads.DENSE]
    for size in (16, 64, 256, 512, 4096):
        heads.GROUP_BYTES = size * 2**20
        runner = PieceRunner(program, {**weights, **buffers}.__getitem__, cores)
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            list(runner.run([given], cores))
            seconds.append(time.perf_counter() - started)
        print(f"dense layer      {size:5} MiB   {sorted(seconds)[1]:6.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--layers", type=int, help="3; of Youtu's shape 32")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--index-topk", type=int)
    parser.add_argument("--verify", type=int, default=8, help="sequences of the verification")
    parser.add_argument("--youtu", action="store_true", help="one model of Youtu-LLM-2B's shape instead")
    parser.add_argument("--rows", action="store_true", help="the sizes of tiles instead")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--stream", action="store_true", help="one sequence through one layer instead, of --sequence-length tokens"
    )
    parser.add_argument("--streamed", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not another(options):
        conversions(options)


def another(options: argparse.Namespace) -> bool:
    """Whether something else than conversions was asked for, which is done."""
    if options.streamed:
        kind, folder = options.streamed
        print(json.dumps(stream(Path(folder), kind, options.sequence_length)))
    elif options.stream:
        streams(options.heads, options.sequence_length or 8192)
    elif options.rows:
        heads_of_a_group()
        rows()
    return bool(options.streamed or options.stream or options.rows)


def conversions(options: argparse.Namespace) -> None:
    layers = options.layers or (32 if options.youtu else 3)
    for heads in [16] if options.youtu else options.heads:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            if options.youtu:
                make_youtu(model, layers)
            else:
                make(model, heads, layers, options.context)
            found = convert(model, Path(folder) / "out", options)
        if options.json:
            print(json.dumps({"heads": heads, **found}), flush=True)
            continue
        print(
            f"{heads} heads, {layers} layers, {found['sequences']} x {found['sequence_length']} tokens: "
            f"predicted {found['peak_memory'] / GIB:.2f} GiB and {found['seconds']:.0f} s, "
            f"measured {found['measured_peak'] / GIB:.2f} GiB and {found['measured_seconds']:.0f} s, "
            f"exit {found['exit']} {' '.join(found['said'])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
