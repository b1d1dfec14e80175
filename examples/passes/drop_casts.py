"""drop_casts: remove the casts that change nothing.

    x: f32 --to(f32)--> y: f32 --> mul        =>        x: f32 --> mul

Modelling code casts to float32 in every norm and back after it; in a model that is float32 anyway each of these is a node
that a reader, an exporter and a runtime have to step over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mla2dsa.passes.graph.arguments import flag_arg, node_arg
from mla2dsa.passes.graph.graph_eval import value
from mla2dsa.passes.manager import BrokenPass, Pass, Report, Work

CAST = torch.ops.aten.to.dtype  # (self, dtype, non_blocking, copy, memory_format)


@dataclass(frozen=True)
class Dropped:
    """The fact that the pass finds: how many casts went, and how many stayed."""

    casts: int
    kept: int


@dataclass(frozen=True)
class DropCasts(Pass):
    name: ClassVar[str] = "drop_casts"

    def requires(self, work: Work) -> None:
        """Any exported program."""

    def run(self, work: Work) -> Report:
        casts = casts_of(work)
        idle = [node for node in casts if is_idle(node)]
        for node in idle:
            node.replace_all_uses_with(node_arg(node, 0, "self"))
            work.editor.graph.erase_node(node)
        kept = [node for node in casts if node not in idle]
        return Report(
            did=(f"{len(idle)} of {len(casts)} casts dropped",),
            details=tuple(f"{node.name} makes {value(node).dtype}" for node in kept),
            fact=Dropped(len(idle), len(kept)),
        )

    def ensures(self, work: Work) -> None:
        left = [node for node in casts_of(work) if is_idle(node)]
        if left:
            raise BrokenPass(self.name, "a cast that changes nothing is left", left[0].name)


def casts_of(work: Work) -> list[Node]:
    return [node for node in work.editor.graph.nodes if node.target is CAST]


def is_idle(cast: Node) -> bool:
    """Such a cast gives back the very tensor that it was given, unless it is asked for a copy or another layout."""
    plain = not flag_arg(cast, 3, "copy") and len(cast.args) < 5 and "memory_format" not in cast.kwargs
    return plain and value(cast).dtype == value(node_arg(cast, 0, "self")).dtype
