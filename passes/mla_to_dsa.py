"""mla_to_dsa: rewrite every MLA site into indexer + top-k + sparse attention on the latent.

    before   K, V = expand(kv_b latent, k_pe);  out = softmax(scale q K^T + causal & padding) V         O(L^2)
    after    indices = lightning_indexer(q_resid, hidden);  attended = sparse_mla(q absorbed, [latent | k_pe], indices)
             out = attended W_UV                                                                        O(L index_topk)

With index_topk >= length every key is selected and the result *is* dense attention. The dense attention, its mask and the
expanded keys and values are gone from the graph; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..errors import UserError
from ..kernels.spec import IndexerConfig, IndexerWeights
from .building.absorb import key_range, key_rows, query_rows, value_heads
from .building.lightning_indexer import select
from .find_mla import find_mla_in
from .graph.editor import ProgramEditor
from .matching.sites import Found, MlaSite
from .normalize import Normalize


@dataclass(frozen=True)
class Change:
    """One rewritten layer: its module path, and the node that now is the attention output [B, H, T, v_head_dim]."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Converted:
    """Result of `mla_to_dsa`. `functionalised` says that the program had to be decomposed first (slow path)."""

    program: ExportedProgram
    found: Found
    changes: tuple[Change, ...]
    nodes_removed: int
    functionalised: bool = False
    added: tuple[str, ...] = ()


class MlaToDsa(PassBase):
    """The pass over an editor's graph module; `mla_to_dsa` is the way to call it on a program."""

    def __init__(
        self,
        editor: ProgramEditor,
        found: Found,
        config: IndexerConfig,
        weights: Mapping[str, IndexerWeights],
        allow_partial: bool,
    ) -> None:
        self._editor, self._found, self._config, self._weights = editor, found, config, weights
        self._allow_partial = allow_partial
        self.changes: list[Change] = []
        self.nodes_removed = 0

    def requires(self, graph_module: GraphModule) -> None:
        require_sites(self._found, self._allow_partial)
        unknown = set(self._weights) - {site.name for site in self._found.sites}
        if unknown:
            raise UserError(
                f"indexer weights are given for {sorted(unknown)[0]}, which is not an MLA layer of this program"
            )
        for site in self._found.sites:
            if self._weights and site.name not in self._weights:
                raise UserError(
                    f"{site.name} has no indexer weights: give weights for every converted layer, or for none"
                )

    def call(self, graph_module: GraphModule) -> PassResult:
        shared: dict[object, Node] = {}
        ranges: dict[Node | None, tuple[Node, Node]] = {}
        for site in self._found.sites:
            self._rewrite(site, shared, ranges)
        self.nodes_removed = self._editor.remove_dead()
        return PassResult(graph_module, True)

    def ensures(self, graph_module: GraphModule) -> None:
        """No dense attention survives in a converted layer."""
        live = {node.name for node in graph_module.graph.nodes}
        left = [change.before for change in self.changes if change.before in live]
        if left:
            raise AssertionError(f"dense attention {left[0]} is still alive after the rewrite")

    def _rewrite(self, site: MlaSite, shared: dict[object, Node], ranges: dict[Node | None, tuple[Node, Node]]) -> None:
        dense = site.core.out
        build = self._editor.builder(before=dense)
        if site.padding not in ranges:
            ranges[site.padding] = key_range(build, site)
        indices = select(build, site, self._config, self._weights.get(site.name), ranges[site.padding], shared)
        attended = build(
            torch.ops.mla2dsa.sparse_mla.default,
            query_rows(build, site, site.core.q),
            key_rows(build, site),
            indices,
            float(site.core.scale),
            site.dims.kv_lora_rank,
        )
        out = value_heads(build, site, attended)
        dense.replace_all_uses_with(out)
        self._editor.graph.erase_node(dense)  # SDPA counts as impure: dead code elimination alone would keep it
        self.changes.append(Change(site.name, dense.name, out.name))


def require_sites(found: Found, allow_partial: bool = False) -> None:
    """Raises UserError when nothing matched, or when a core was missed and that is not allowed."""
    if not found.sites:
        why = f"; {found.misses[0]}" if found.misses else " and no attention at all"
        raise UserError(f"no dense MLA attention in this model{why}")
    if found.misses and not allow_partial:
        more = f" (and {len(found.misses) - 1} more)" if len(found.misses) > 1 else ""
        raise UserError(
            f"{found.misses[0]}{more}: not dense MLA; pass --allow-partial to convert the other layers only"
        )


def prepare(program: ExportedProgram) -> tuple[ProgramEditor, Found, bool]:
    """An editor on a normalised copy of `program`, its sites, and whether it had to be functionalised (slow)."""
    editor, found = _edit(program)
    if not any("in-place write" in miss.reason for miss in found.misses):
        return editor, found, False
    return (*_edit(program.run_decompositions({})), True)


def _edit(program: ExportedProgram) -> tuple[ProgramEditor, Found]:
    editor = ProgramEditor(program)
    Normalize()(editor.module)
    return editor, find_mla_in(editor.graph, program.graph_signature, program.constants)


def mla_to_dsa(
    program: ExportedProgram,
    config: IndexerConfig,
    weights: Mapping[str, IndexerWeights] | None = None,
    allow_partial: bool = False,
) -> Converted:
    """Rewrite all MLA attention of `program` (left unchanged) into DSA.

    weights: per layer name; None declares the new parameters without values (meta tensors), to be loaded later.
    Raises UserError when no core matched, or when one was missed and `allow_partial` is not set.
    """
    editor, found, functionalised = prepare(program)
    rewrite = MlaToDsa(editor, found, config, weights or {}, allow_partial)
    rewrite(editor.module)
    added = tuple(f"{site.name}.indexer.{name}" for site in found.sites for name in IndexerWeights.shapes(config, 1, 1))
    return Converted(editor.finish(), found, tuple(rewrite.changes), rewrite.nodes_removed, functionalised, added)
