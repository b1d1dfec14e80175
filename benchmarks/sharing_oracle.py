"""What one selection for several layers can do at best: the keys with the most attention of one layer, or of all of them together.

    python benchmarks/sharing_oracle.py [--example tiny-recall] [--sequences 8]

Each set of layers shares with the last layer before it that is not in it. `own`: that layer's own best keys, as when an indexer is made for
it alone; `mean`: those with the most attention on the average of the layers that take them, which is what `convert --share` fits to.
Nats/token on held-out text above the dense model. Attention is the dense model's, so that only the choice differs. Minutes; committed:
results/sharing_oracle.txt.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch
from sharing import EXAMPLES, corpus
from torch import Tensor

from mla2dsa.optimizer.indexer.indexer_math import random_indexer
from mla2dsa.optimizer.model.text import load_tokenizer, read_tokens
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.optimizer.plan import Prepared, prepare
from mla2dsa.optimizer.proof.evaluate import SPARSE_MLA
from mla2dsa.optimizer.proof.losses import mean_loss
from mla2dsa.optimizer.recipe import Recipe
from mla2dsa.optimizer.share.programs import sharing_runner
from mla2dsa.runtime.execute import PieceRunner
from mla2dsa.runtime.shelf import Shelf

SIZES = {"tiny-mla": (64, 1024), "tiny-recall": (128, 2048)}  # index_topk, tokens of a sequence


@dataclass
class Ops:
    """In the place of `sparse_mla`, tile of queries by tile of queries, in the order of the layers."""

    masses: list[Tensor] = field(default_factory=list)  # of each call
    keys: Iterator[Tensor] = field(default_factory=lambda: iter(()))

    def dense(self, q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
        """Attention to all keys up to a query's own, whose mass is kept."""
        end = torch.arange(kv.shape[1] - q.shape[1] + 1, kv.shape[1] + 1).expand(q.shape[:2])
        self.masses.append(torch.ops.mla2dsa.attention_mass(q, kv, torch.zeros_like(end), end, scale).half())
        everything = torch.arange(kv.shape[1]).expand(*q.shape[:2], -1)
        seen = everything.masked_fill(everything >= end[..., None], -1).int()
        out: Tensor = torch.ops.mla2dsa.sparse_mla(q, kv, seen, scale, kv_lora_rank)
        return out

    def given(self, q: Tensor, kv: Tensor, indices: Tensor, scale: float, kv_lora_rank: int) -> Tensor:
        out: Tensor = torch.ops.mla2dsa.sparse_mla(q, kv, next(self.keys), scale, kv_lora_rank)
        return out


def best(masses: Sequence[Tensor], index_topk: int) -> Tensor:
    """Keys with the most of their sum, -1 for those that have none."""
    found = torch.stack([mass.float() for mass in masses]).sum(0)
    top = found.topk(min(index_topk, found.shape[-1]), dim=-1)
    return top.indices.masked_fill(top.values <= 0, -1).int()


def groups(layers: int, shared: Sequence[int]) -> list[list[int]]:
    """Of every layer, those that attend to the same selection, the one that selects first."""
    found = list[list[int]]()
    for layer in range(layers):
        found.append(found[-1] if layer in shared else [])
        found[-1].append(layer)
    return found


def losses(
    runners: dict[str, PieceRunner], ops: Ops, ids: Tensor, index_topk: int, layers: int
) -> Iterator[tuple[str, float]]:
    """Of one sequence: dense, then every set of layers both ways."""
    ops.masses.clear()
    yield "dense", mean_loss(runners["dense"], [ids], index_topk)
    tiles = len(ops.masses) // layers
    of_layer = [ops.masses[layer * tiles : (layer + 1) * tiles] for layer in range(layers)]
    for count in range(layers):
        for shared in combinations(range(1, layers), count):
            for way in ("own", "mean"):
                taken = [group[:1] if way == "own" else group for group in groups(layers, shared)]
                ops.keys = (best([of_layer[n][tile] for n in by], index_topk) for by in taken for tile in range(tiles))
                yield f"{list(shared)} {way}", mean_loss(runners["given"], [ids], index_topk)


def prepared(example: str) -> tuple[Prepared, dict[str, PieceRunner], Ops]:
    made, ops = prepare(str(EXAMPLES / example), Recipe(index_topk=SIZES[example][0])), Ops()
    source, config = WeightSource(made.checkpoint, made.capture), made.plan.indexer
    unused = {name: random_indexer(config, dims.hidden_size, dims.q_width) for name, dims in made.plan.layers}
    runners = {
        name: sharing_runner(source, unused, config, False, Shelf(), {SPARSE_MLA: op})
        for name, op in (("dense", ops.dense), ("given", ops.given))
    }
    return made, runners, ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--sequences", type=int, default=8)
    options = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {options.sequences} sequences")
    for example in options.example:
        made, runners, ops = prepared(example)
        topk, length = SIZES[example]
        with tempfile.TemporaryDirectory() as folder:
            text = corpus("held-out", Path(folder) / "text.txt")
            tokens = read_tokens(text, load_tokenizer(EXAMPLES / example), options.sequences * length)
        found: dict[str, list[float]] = {}
        for ids in tokens.sequences(length, options.sequences):
            for name, loss in losses(runners, ops, ids, topk, len(made.plan.layers)):
                found.setdefault(name, []).append(loss)
        dense = sum(found.pop("dense"))
        for name, of in found.items():
            print(
                f"{example}, top-k {topk} of {length} tokens, layers that share {name}: {(sum(of) - dense) / len(of):+.4f}"
            )


if __name__ == "__main__":
    main()
