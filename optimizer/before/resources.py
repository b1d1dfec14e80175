"""What a conversion will take: memory, room for hidden states, and operations; and how long its sequences may be for it.

Memory is a written-down model: weights of the largest piece, what one sequence needs at the worst moment of a piece
(`runtime.footprint`), what waits in memory, and what a layer's fit or transformers' models take. All of it follows from the
model and the recipe alone; what this process holds already, and the time, are this machine's (`Machine`).
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ...errors import UserError
from ...files.safetensors_index import TensorLocation
from ...kernels.cpu import BUDGET_MB
from ...kernels.spec import IndexerConfig
from ...passes.matching.sites import MlaDims
from ...passes.mla_to_dsa import Converted
from ...runtime.execute import PieceRunner
from ...runtime.footprint import Footprint, Footprints
from ...runtime.shelf import BUDGET
from ..indexer.closed_form import REFIT_TOKENS
from ..indexer.head_weights import EXCESS_WEIGHTS, ONE_ROUNDS, ONE_TOKENS
from ..indexer.indexer_math import BLOCK_ELEMENTS
from ..model.free_memory import free_memory
from ..proof.figures import POSITIONS
from ..proof.streamed_model import loading_bytes, tensor_sizes
from ..recipe import Recipe, read_budget
from ..recipes.layers import each_layer
from ..share.choose import made_at_most, passes
from ..verify import PARITY_SEQUENCES, parity_length
from .space import Needs

# benchmarks/memory.py: what 64 heads of DeepSeek-V3's width take at 8192 tokens is 2.6 GiB, what 128 take at 6144 is 3.9.
PASS_BUDGET = 4 * 2**30  # bytes that one sequence may need on its way through a piece, weights aside
# benchmarks/memory.py: classes that transformers loads later, threads' scratch and what the allocator keeps.
SLACK = 400 * 2**20
# benchmarks/memory.py: what gathers, sorts and narrow products reach of the rate of a large one.
SHARE_OF_RATE = 0.5
STATES = "hidden states"
INDEXERS = "indexers"
_SHORTEST = 1.25  # of index_topk: sequences shorter than that hardly say anything about what is left out
_STEP = 256  # tokens that sequences are made shorter by
_PROBE = 1024  # rows of the matrices whose product is timed
MOST_HELD_OUT = 4  # sequences of text that decide what is taken, at most
_MOST_CHECKED = 16  # sequences that go through the vocabulary: DeepSeek-V3's 129280 tokens in sequences of 8192


@dataclass(frozen=True)
class Resources:
    """sequence_length: tokens of a sequence; sequences: fitted on, deciding, going through the vocabulary and proving together.
    Bytes: memory at the worst moment, by what takes it, beyond what the process holds when it begins; transformers: what its
    models take in the place of the last of these, unless skipped; disk: of hidden states, while it runs. flops:
    multiplications and additions, those of distillation among them but where it has its own time: seconds, at most."""

    sequence_length: int
    sequences: int
    memory: dict[str, int]
    disk: int
    flops: float
    transformers: int = 0
    seconds: float = 0.0

    @property
    def streaming(self) -> int:
        """The most memory that anything but the comparison with transformers takes."""
        return sum(self.memory.values())

    @property
    def most(self) -> int:
        """The same, with that comparison."""
        return max(self.streaming, self.memory.get(STATES, 0) + self.memory.get(INDEXERS, 0) + self.transformers)


@dataclass(frozen=True)
class Machine:
    """What is so here and now. resident: bytes this process has; rate: floating-point operations a second."""

    resident: int
    rate: float

    def peak(self, needed: Resources) -> int:
        """Bytes of memory at the worst moment of a conversion, all in all."""
        return self.resident + SLACK + needed.most

    def seconds(self, needed: Resources) -> float:
        return needed.flops / (SHARE_OF_RATE * self.rate) + needed.seconds


def this_machine() -> Machine:
    """Takes a tenth of a second."""
    return Machine(resident(), measured_rate())


@dataclass(frozen=True)
class Streams:
    """The two programs that are streamed, whose logits are never whole in memory, and the sizes that the rest follows from."""

    dense: Footprints
    sparse: Footprints
    config: IndexerConfig
    names: tuple[str, ...]
    layers: tuple[MlaDims, ...]
    weights: int  # that transformers has in memory at a time, bytes
    rows: int
    indexers: int  # of all layers, float32, bytes

    def pieces(self, length: int) -> tuple[list[Footprint], list[Footprint]]:
        """The dense ones as calibration has them: a layer's samples stay while its piece runs."""
        rows = min(self.rows, length)
        samples = max((_sample(dims, length, rows) for dims in self.layers), default=0)
        dense = [
            replace(piece, peak=piece.peak + samples + BUDGET_MB * 2**20, watched=samples)
            for piece in self.dense.at(length)
        ]
        return dense, self.sparse.at(length)


def streams(
    program: ExportedProgram,
    converted: Converted,
    config: IndexerConfig,
    rows: int,
    tensors: Mapping[str, TensorLocation],
) -> Streams:
    """Of a captured program and the one it became. tensors: of the checkpoint."""
    dense = PieceRunner(program, _nothing, [change.before for change in converted.changes])
    sparse = PieceRunner(converted.program, _nothing, [change.after for change in converted.changes])
    indexers = [
        (name, tensor.numel(), 4 * tensor.numel())
        for name, tensor in converted.program.state_dict.items()
        if ".indexer." in name
    ]
    weights = loading_bytes(chain(tensor_sizes(tensors), indexers))
    sites = converted.found.sites
    names, layers = tuple(site.name for site in sites), tuple(site.dims for site in sites)
    return Streams(
        Footprints(dense, late=True), Footprints(sparse, late=True), config, names, layers, weights, rows,
        sum(size for _, _, size in indexers),
    )  # fmt: skip


def _sample(d: MlaDims, length: int, rows: int) -> int:
    """Bytes of a `SiteSample`, float32."""
    key = d.kv_lora_rank + d.qk_rope_head_dim
    every_token = d.hidden_size + d.q_width + key + d.qk_rope_head_dim
    return 4 * (length * every_token + rows * (d.num_heads * key + length))


def _nothing(name: str) -> Any:
    raise AssertionError(f"{name} is only looked at")


def sequence_length(found: Streams, recipe: Recipe, context: int) -> int:
    """Tokens of a sequence: what the recipe says, or four times index_topk, or as many as PASS_BUDGET has room for."""
    if recipe.sequence_length:
        return recipe.sequence_length
    topk = found.config.index_topk
    length = min(context, max(1024, 4 * topk))
    shortest = min(length, math.ceil(topk * _SHORTEST))
    if _worst(found, length) <= PASS_BUDGET:
        return length
    lengths: list[int] = [*range(length - _STEP, shortest, -_STEP), shortest]
    # halving, since each look goes through the whole graph
    fits = bisect_left(lengths[:-1], True, key=lambda tokens: _worst(found, tokens) <= PASS_BUDGET)
    return lengths[fits]


def _worst(found: Streams, length: int) -> int:
    return max(piece.peak for pieces in found.pieces(length) for piece in pieces)


def checking_sequences(vocabulary: int, length: int) -> int:
    """Sequences that go through the vocabulary, or as much of it as fits."""
    return min(_MOST_CHECKED, math.ceil(vocabulary / length))


def resources(found: Streams, recipe: Recipe, context: int, vocabulary: int) -> Resources:
    """For the whole conversion, with its verification. vocabulary: number of tokens."""
    length = sequence_length(found, recipe, context)
    dense, sparse = found.pieces(length)
    fitted = 0 if recipe.donor else max(1, (recipe.tokens or length * recipe.sequences) // length)
    choosing = MOST_HELD_OUT if fitted or recipe.share == "auto" else 0
    choosing += checking_sequences(vocabulary, length) + recipe.random_beside(MOST_HELD_OUT) if fitted else 0
    fitted, proving = fitted + recipe.random_beside(fitted), recipe.verify.sequences
    served = 2 if recipe.shares else 1  # samples of a layer wait for those of the layers that share its indexer
    waiting = max(piece.carried + served * piece.watched for piece in dense)
    evaluating = proving * sum(max(piece.carried for piece in pieces) for pieces in (dense, sparse, sparse, sparse))
    shelved = max((fitted + choosing) * waiting, evaluating, proving * waiting)
    fit = _fit(found, recipe, length, fitted) if fitted else 0
    stages = {
        "one sequence, its layer's weights and fit": max(
            p.weights + max(p.peak, fit if p.watched else 0) for p in dense
        ),
        "dense and sparse side by side": _side_by_side(found, dense, sparse, length, vocabulary),
    }
    held, largest = min(shelved, BUDGET), max(stages, key=lambda name: stages[name])
    made = made_at_most(len(found.layers)) if recipe.share == "auto" and fitted else 1.0
    memory = {STATES: held, largest: stages[largest], INDEXERS: round(found.indexers * made)}
    flops = (fitted + choosing) * sum(p.flops for p in dense[:-1])  # all but the logits
    flops += 2 * proving * sum(p.flops for p in dense)
    flops += 3 * proving * sum(p.flops for p in sparse) + proving * _oracles(found, length)
    sets = 1
    if recipe.share == "auto":  # indexers for no sharing, and anew for every set of layers that is tried
        sets = passes(len(found.layers)) - 1
        flops += _choosing(dense, sparse, sets, choosing if fitted else 0, fitted)
    flops += sets * _constant_ones(found, fitted * length) if fitted else 0.0
    training, seconds = (sets * amount for amount in _training(found, recipe, length))
    return Resources(
        length,
        fitted + choosing + proving,
        memory,
        shelved - held,
        flops + training,
        _transformers(found, length, vocabulary),
        seconds,
    )


def _choosing(dense: Sequence[Footprint], sparse: Sequence[Footprint], sets: int, choosing: int, fitted: int) -> float:
    """Operations of the passes that choose which layers share: one that shows attention mass, one for the loss with each set of indexers,
    and one that all but the first are fitted in."""
    once = sum(p.flops for p in dense[:-1])
    return MOST_HELD_OUT * (once + sets * sum(p.flops for p in sparse)) + (sets - 1) * (fitted + choosing) * once


def refuse_if_too_large(needed: Resources, place: Path, count: int = 1) -> None:
    """Raises UserError when the memory that is free now, or the disk at `place`, has no room for it. count: of processes on this
    machine, of which each has a layer and as many samples as one alone: fewer sequences, more layers at once."""
    more, free = count * needed.streaming, free_memory()
    if more > free:
        fewer = "" if count == 1 else f" for {count} processes"
        mend = f"{', start fewer processes' if count > 1 else ''}, or use another machine"
        raise UserError(
            f"the conversion needs {_gib(more)} more memory{fewer}, {_gib(free)} are free; set a smaller sequence_length than "
            f"{needed.sequence_length} in the recipe{mend}"
        )
    disk = Needs()
    disk.add(place, count * needed.disk, "hidden states of the sequences, while it runs")
    if faults := disk.faults():
        raise UserError(faults[0])


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _fit(found: Streams, recipe: Recipe, length: int, fitted: int) -> int:
    """The largest layer's maps and moments, and blocks of scores: float32 maps, float64 moments."""
    config, sizes = found.config, []
    for d in found.layers:
        head = d.kv_lora_rank + d.qk_nope_head_dim + d.qk_rope_head_dim
        maps = 4 * d.num_heads * (d.q_width * (2 * head - d.kv_lora_rank) + 2 * d.kv_lora_rank * d.qk_nope_head_dim)
        moments = length * (20 * d.kv_lora_rank + 12 * d.q_width + 4 * d.hidden_size)
        tokens = min(fitted * length, 4 * ONE_TOKENS)
        smaller = min(tokens // 2, d.hidden_size)
        one = 16 * tokens * d.hidden_size + 16 * smaller**2
        refit = 24 * min(fitted * length, REFIT_TOKENS, d.hidden_size) * d.hidden_size
        sizes.append(maps + max(moments, one, refit))
    elements = min(recipe.rows, length) * config.index_n_heads * length
    blocks = 4 * 4 * (elements if recipe.distils else min(elements, BLOCK_ELEMENTS))
    return max(sizes) + blocks


def _side_by_side(
    found: Streams, dense: Sequence[Footprint], sparse: Sequence[Footprint], length: int, vocabulary: int
) -> int:
    """The most of three. A piece of a selection's program, and what the logits of those before are made from (dense, DSA, oracle,
    window). All of that with both heads, and the blocks that two are compared in: logits and logarithms of each, and what the
    divergence takes. The weights of a piece of both, which short sequences go through in step."""
    made_from = 4 * length * found.layers[-1].hidden_size
    streaming = max(p.weights + p.peak for p in sparse) + 3 * made_from
    judging = found.dense.head + found.sparse.head + 4 * made_from + 7 * 4 * POSITIONS * vocabulary
    return max(streaming, judging, max(a.weights + b.weights for a, b in zip(dense, sparse, strict=True)))


def _transformers(found: Streams, length: int, vocabulary: int) -> int:
    """Its model, a group of layers at a time; our head beside its, and what the logits of every sequence are made from; and two score
    matrices, or the blocks that logits are compared in."""
    heads, hidden = [d.num_heads for d in found.layers], found.layers[-1].hidden_size
    tokens = min(length, parity_length(found.config, heads))
    scores = 2 * 4 * max(found.config.index_n_heads, *heads) * tokens**2
    made_from = 4 * hidden * (vocabulary + (PARITY_SEQUENCES + 1) * tokens)
    return found.weights + made_from + max(scores, 3 * 4 * POSITIONS * vocabulary)


def _constant_ones(found: Streams, tokens: int) -> float:
    """What takes longest of a closed form: factorisations of as many channels as a hidden state has, for every round of reweighting
    (half of those allowed, which is usual), and what they are made from; float64, which runs at half the rate."""
    tokens, rounds = min(tokens, 2 * ONE_TOKENS), len(EXCESS_WEIGHTS)
    widths = [d.hidden_size for d in found.layers]
    return 2.0 * sum(rounds * (ONE_ROUNDS / 2 * width**3 / 3 + tokens * width**2) for width in widths)


def _oracles(found: Streams, length: int) -> float:
    """Attention mass of every query of a sequence."""
    return sum(2.0 * length**2 * d.num_heads * (d.kv_lora_rank + d.qk_rope_head_dim) for d in found.layers)


def _training(found: Streams, recipe: Recipe, length: int) -> tuple[float, float]:
    """(operations of distilling layers, seconds): of those whose budget is a time, that alone."""
    trained = [one for one in each_layer(recipe, found.names).values() if recipe.trains(one.indexer)]
    of_budget: dict[tuple[str, str | None], float] = {}
    for one in trained:
        of_budget[one.shared, one.budget] = of_budget.get((one.shared, one.budget), 0.0) + one.steps
    steps, took = 0.0, 0.0
    for (_, budget), wanted in of_budget.items():
        amount, unit = (math.inf, "steps") if budget is None else read_budget(budget)
        if unit == "seconds":
            took += amount
        else:
            steps += min(wanted, amount if unit == "steps" else amount / length)
    config = found.config  # a step: forward, and backward to both factors
    return steps * 6.0 * recipe.rows * length * config.index_n_heads * config.index_head_dim, took


def resident() -> int:
    """Bytes of memory this process has now; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def measured_rate(dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a matrix product on this machine as it is loaded now: the median of five, a tenth of a second in all."""
    a, b = (torch.ones(_PROBE, _PROBE, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2.0 * _PROBE**3 / sorted(seconds)[2]
