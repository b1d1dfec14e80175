"""tap: expose what calibration needs of every MLA site, as extra outputs of the dense program.

Per site `<name>.`: hidden [B, T, D], q_resid [B, T, q_width], query [B, R, H, kv_lora_rank + dr] (absorbed, rotated, at the
sampled rows), key [B, T, kv_lora_rank + dr], mass [B, R, T] (dense probabilities averaged over heads), attention
[B, H, T, dv] (the core's output), and once `cos`, `sin` [B|1, T, dr / 2]. The rows are a new input `tap_rows` [R] int64.
The program's own outputs stay: it returns (outputs, {tap name: value}).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ..compat.aliasing import Memory
from ..errors import UserError
from .building.absorb import key_range, key_rows, query_rows
from .building.lightning_indexer import rotary_table
from .graph.editor import GraphBuilder, ProgramEditor
from .manager import BrokenPass, Pass, Report, Work, run_passes
from .matching.sites import Found, MlaSite
from .mla_to_dsa import require_sites

aten = torch.ops.aten

ROWS_INPUT = "tap_rows"
SITE_TAPS = ("hidden", "q_resid", "query", "key", "mass", "attention")
TABLE_TAPS = ("cos", "sin")


@dataclass(frozen=True)
class Tapped:
    """Result of `tap`: the program with the extra outputs, its sites, and the name of every tap's node by output name."""

    program: ExportedProgram
    found: Found
    taps: dict[str, str]


@dataclass(frozen=True)
class Taps:
    """The node of every tap by output name."""

    nodes: dict[str, Node]


@dataclass(frozen=True)
class Tap(Pass):
    """rows: the number of sampled query rows (fixed)."""

    rows: int
    allow_partial: bool = False
    name: ClassVar[str] = "tap"

    def requires(self, work: Work) -> None:
        found = work.fact(Found)
        require_sites(found, self.allow_partial)
        for name, calls in Counter(site.name for site in found.sites).items():
            if calls > 1:
                raise UserError(f"{name} is called twice in this model: calibration cannot tell the calls apart")

    def run(self, work: Work) -> Report:
        editor, found = work.editor, work.fact(Found)
        rows = editor.add_input(ROWS_INPUT, (self.rows,), torch.int64)
        shared: dict[object, Node] = {}
        taps: dict[str, Node] = {}
        memory = Memory(editor.graph)
        for site in found.sites:
            taps |= _taps_of(editor, site, rows, shared, memory)
        for name, node in taps.items():
            editor.add_output(name, node)
        editor.remove_dead()
        return Report(
            did=(f"{len(taps)} values of {len(found.sites)} layers given out, at {self.rows} query rows",),
            could_not=tuple(f"tap {miss}" for miss in found.misses),
            fact=Taps(taps),
        )

    def ensures(self, work: Work) -> None:
        """Every tap is an output, and the dense attention still stands."""
        alive = set(work.editor.graph.nodes)
        outputs = set(work.editor.output.all_input_nodes)
        for name, node in work.fact(Taps).nodes.items():
            if node not in alive or node not in outputs:
                raise BrokenPass(self.name, f"{name} is not given out", node.name)


def _taps_of(
    editor: ProgramEditor, site: MlaSite, rows: Node, shared: dict[object, Node], memory: Memory
) -> dict[str, Node]:
    # After the attention, before anything else: nothing that leads to it has a reader that needs all heads at once (`runtime/tiled`).
    build = editor.builder(before=site.core.out.next)
    query = query_rows(build, site, build(aten.index_select.default, site.core.q, 2, rows))
    key = key_rows(build, site)
    begin, end = (build(aten.index_select.default, bound, 1, rows) for bound in _range(build, site, shared))
    mass = build(torch.ops.mla2dsa.attention_mass.default, query, key, begin, end, float(site.core.scale))
    hidden, q_input, attended = (_kept(node, memory, build) for node in (site.hidden, site.q_input, site.core.out))
    values = (hidden, q_input, query, key, mass, attended)
    named = dict(zip(SITE_TAPS, values, strict=True))
    table = rotary_table(build, site, shared)
    if table is not None:
        named |= zip(TABLE_TAPS, table, strict=True)
    return {f"{site.name}.{name}": node for name, node in named.items()}


def _kept(node: Node, memory: Memory, build: GraphBuilder) -> Node:
    """`node`, or a copy where something writes into its memory: an output is what the memory holds in the end."""
    return build(aten.clone.default, node) if memory.is_written(node) else node


def _range(build: GraphBuilder, site: MlaSite, shared: dict[object, Node]) -> tuple[Node, Node]:
    if ("begin", site.padding) not in shared:
        shared["begin", site.padding], shared["end", site.padding] = key_range(build, site)
    return shared["begin", site.padding], shared["end", site.padding]


def tap(program: ExportedProgram, rows: int, allow_partial: bool = False) -> Tapped:
    """`program` (left unchanged) with the taps of all its MLA sites. Raises UserError as `mla_to_dsa` does."""
    from .pipeline import tap_passes  # the list of passes names this file's

    run = run_passes(program, tap_passes(rows, allow_partial))
    return Tapped(run.program, run.fact(Found), {name: node.name for name, node in run.fact(Taps).nodes.items()})
