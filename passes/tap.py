"""tap: expose what calibration needs of every MLA site, as extra outputs of the dense program.

Per site `<name>.`: hidden [B, T, D], q_resid [B, T, q_width], query [B, R, H, kv_lora_rank + dr] (absorbed, rotated, at the
sampled rows), key [B, T, kv_lora_rank + dr], mass [B, R, T] (dense probabilities averaged over heads), attention
[B, H, T, dv] (the core's output), and once `cos`, `sin` [B|1, T, dr / 2]. The rows are a new input `tap_rows` [R] int64.
The program's own outputs stay: it returns (outputs, {tap name: value}).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..errors import UserError
from .building.absorb import key_range, key_rows, query_rows
from .building.lightning_indexer import rotary_table
from .graph.editor import GraphBuilder, ProgramEditor
from .matching.sites import Found, MlaSite
from .mla_to_dsa import prepare, require_sites

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


class Tap(PassBase):
    """The pass over an editor's graph module. `rows` is the number of sampled query rows (fixed)."""

    def __init__(self, editor: ProgramEditor, found: Found, rows: int) -> None:
        self._editor, self._found, self._rows = editor, found, rows
        self.taps: dict[str, Node] = {}

    def call(self, graph_module: GraphModule) -> PassResult:
        rows = self._editor.add_input(ROWS_INPUT, (self._rows,), torch.int64)
        shared: dict[object, Node] = {}
        for site in self._found.sites:
            self._tap(site, rows, shared)
        for name, node in self.taps.items():
            self._editor.add_output(name, node)
        return PassResult(graph_module, True)

    def _tap(self, site: MlaSite, rows: Node, shared: dict[object, Node]) -> None:
        build = self._editor.builder(before=site.core.out)
        query = query_rows(build, site, build(aten.index_select.default, site.core.q, 2, rows))
        key = key_rows(build, site)
        begin, end = (build(aten.index_select.default, bound, 1, rows) for bound in self._range(build, site, shared))
        mass = build(torch.ops.mla2dsa.attention_mass.default, query, key, begin, end, float(site.core.scale))
        values = (site.hidden, site.q_input, query, key, mass, site.core.out)
        if f"{site.name}.{SITE_TAPS[0]}" in self.taps:
            raise UserError(f"{site.name} is called twice in this model: calibration cannot tell the calls apart")
        for name, node in zip(SITE_TAPS, values, strict=True):
            self.taps[f"{site.name}.{name}"] = node
        table = rotary_table(build, site, shared)
        if table is not None:
            for name, node in zip(TABLE_TAPS, table, strict=True):
                self.taps[f"{site.name}.{name}"] = node

    @staticmethod
    def _range(build: GraphBuilder, site: MlaSite, shared: dict[object, Node]) -> tuple[Node, Node]:
        if ("begin", site.padding) not in shared:
            shared["begin", site.padding], shared["end", site.padding] = key_range(build, site)
        return shared["begin", site.padding], shared["end", site.padding]


def tap(program: ExportedProgram, rows: int, allow_partial: bool = False) -> Tapped:
    """`program` (left unchanged) with the taps of all its MLA sites. Raises UserError as `mla_to_dsa` does."""
    editor, found, _ = prepare(program)
    require_sites(found, allow_partial)
    taps = Tap(editor, found, rows)
    taps(editor.module)
    editor.remove_dead()
    return Tapped(editor.finish(), found, {name: node.name for name, node in taps.taps.items()})
