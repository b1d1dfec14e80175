"""Stacked experts of which one is in memory at a time: a layer of DeepSeek-V3 has 45 GB of them in float32.

A graph reads them in one way, `moe_experts`, which takes one after the other. So where a layer's are large, they are not loaded
with its other weights: each is read from its file when it is its turn, for a few sequences that wait for each other there. The
results are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.anchors import run_experts
from ..passes.graph.graph_eval import value

# Moonlight's and GLM-4.7-Flash's (2.2 GiB of a layer in float32) are held, DeepSeek-V2's and V3's (14 and 42 GiB) are not.
MOST_HELD = 4 * 2**30  # bytes of a layer's experts
# As many as one sequence of DeepSeek-V3's default conversion has, twice: what waits of them is 1.4 GB, beside 42 GiB that are read.
MOST_TOKENS = 16384  # of sequences that an expert serves when it is loaded

_EXPERTS = torch.ops.mla2dsa.moe_experts.default
_SLICE = torch.ops.aten.slice.Tensor


@dataclass(frozen=True)
class OneByOne:
    """A weight [E, ...] that is told by its shape and how to load `w[e]`."""

    shape: tuple[int, ...]
    load: Callable[[int], Tensor]

    def __getitem__(self, expert: int) -> Tensor:
        return self.load(expert)

    def first(self, count: int) -> OneByOne:
        """w[:count]."""
        return replace(self, shape=(len(range(self.shape[0])[:count]), *self.shape[1:]))


def large(weights: Iterable[Node], most: int | None = None) -> dict[Node, int]:
    """Those of `weights` (placeholders) that one `moe_experts` alone reads, of a layer with more than `most` bytes of them (None:
    MOST_HELD); and the bytes of one expert."""
    layers: dict[Node, dict[Node, int]] = {}
    for weight in weights:
        reader = _reader(weight)
        if reader is not None:
            layers.setdefault(reader, {})[weight] = math.prod(value(weight).shape) * value(weight).element_size()
    found = [sizes for sizes in layers.values() if sum(sizes.values()) > (MOST_HELD if most is None else most)]
    return {weight: size // value(weight).shape[0] for sizes in found for weight, size in sizes.items()}


@dataclass(frozen=True)
class Waiting:
    """A `moe_experts` that waits for those of other sequences, so that an expert that is loaded serves all of them. args: its own."""

    args: tuple[Any, ...]


def call(target: Any, args: tuple[Any, ...]) -> OneByOne | Waiting:
    """What an op gives that `large` has found to read experts, or what it waits with. args: OneByOne for these."""
    return args[0].first(args[3]) if target is _SLICE else Waiting(args)


def served(waiting: Sequence[Waiting]) -> list[Tensor]:
    """The results of one node on several sequences."""
    _, _, _, gate_up, down, activation = waiting[0].args
    return run_experts([one.args[:3] for one in waiting], gate_up, down, activation)


def together(tokens: int) -> int:
    """How many sequences of so many tokens wait for each other."""
    return max(1, MOST_TOKENS // max(1, tokens))


def _reader(weight: Node) -> Node | None:
    """The only op that reads it, whole or its first rows, where that takes experts."""
    first = [
        user for user in weight.users if user.target is _SLICE and user.args[1:3] == (0, 0) and len(user.args) == 4
    ]
    reads = [(user, weight) for user in weight.users if user not in first]
    reads += [(user, rows) for rows in first for user in rows.users]
    if len(reads) != 1 or len(weight.users) != 1:
        return None
    ((reader, given),) = reads
    return reader if reader.target is _EXPERTS and given in reader.args[3:5] else None
