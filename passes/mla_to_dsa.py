"""mla_to_dsa: rewrite every MLA site into indexer + top-k + sparse attention on the latent.

    before   K, V = expand(kv_b latent, k_pe);  out = softmax(scale q K^T + causal & padding) V         O(L^2)
    after    indices = lightning_indexer(q_resid, hidden);  attended = sparse_mla(q absorbed, [latent | k_pe], indices)
             out = attended W_UV                                                                        O(L index_topk)

A layer that shares (`IndexerConfig.shared`) has no indexer: it attends to the indices of the last layer before it that has.
With index_topk >= length every key is selected and the result *is* dense attention. The dense attention, its mask and the
expanded keys and values are gone from the graph; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ..errors import UserError
from ..kernels.spec import IndexerConfig, IndexerWeights
from .building.absorb import key_range, key_rows, query_rows, value_heads
from .building.lightning_indexer import select
from .functionalise import Functionalised
from .graph.editor import ProgramEditor
from .manager import BrokenPass, Pass, Report, Work, apply_passes, run_passes
from .matching.cores import find_cores, iter_nodes_of
from .matching.sites import Found, MlaSite


@dataclass(frozen=True)
class Change:
    """One rewritten layer: its module path, and the node that now is the attention output [B, H, T, v_head_dim]."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Rewritten:
    """What the pass did: the changes in graph order, the number of nodes that went, names of the added parameters."""

    changes: tuple[Change, ...]
    nodes_removed: int
    added: tuple[str, ...]


@dataclass(frozen=True)
class Converted:
    """Result of `mla_to_dsa`. `functionalised` says that the program had to be decomposed first (slow path)."""

    program: ExportedProgram
    found: Found
    changes: tuple[Change, ...]
    nodes_removed: int
    functionalised: bool = False
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class MlaToDsa(Pass):
    """weights: per layer name, for all layers that have an indexer, or for none."""

    config: IndexerConfig
    weights: Mapping[str, IndexerWeights] = field(default_factory=dict, repr=False)
    allow_partial: bool = False
    name: ClassVar[str] = "mla_to_dsa"

    def requires(self, work: Work) -> None:
        found = work.fact(Found)
        require_sites(found, self.allow_partial)
        sharing = self._sharing(found)
        unknown = set(self.weights) - {site.name for site in found.sites}
        if unknown:
            raise UserError(
                f"indexer weights are given for {sorted(unknown)[0]}, which is not an MLA layer of this program"
            )
        if idle := sorted(sharing & set(self.weights)):
            raise UserError(f"indexer weights are given for {idle[0]}, which shares the selection of an earlier layer")
        for site in found.sites:
            if self.weights and site.name not in self.weights and site.name not in sharing:
                raise UserError(
                    f"{site.name} has no indexer weights: give weights for every converted layer, or for none"
                )

    def run(self, work: Work) -> Report:
        found = work.fact(Found)
        shared: dict[object, Node] = {}
        ranges: dict[Node | None, tuple[Node, Node]] = {}
        sharing = self._sharing(found)
        changes: list[Change] = []
        indices: Node | None = None
        for site in found.sites:
            indices = indices if site.name in sharing else None
            change, indices = self._rewrite(work.editor, site, shared, ranges, indices)
            changes.append(change)
        removed = work.editor.remove_dead()
        shapes = IndexerWeights.shapes(self.config, 1, 1)
        indexed = [site.name for site in found.sites if site.name not in sharing]
        added = tuple(f"{name}.indexer.{tensor}" for name in indexed for tensor in shapes)
        without = f", {len(sharing)} of them without an indexer" if sharing else ""
        return Report(
            did=(
                f"{len(changes)} layers rewritten, {changes[0].name} to {changes[-1].name}{without}",
                f"{removed} nodes of dense attention removed, {len(added)} parameters added",
            ),
            could_not=tuple(f"rewrite {miss}" for miss in found.misses),
            details=tuple(f"{change.name}: {change.before} became {change.after}" for change in changes),
            fact=Rewritten(tuple(changes), removed, added),
        )

    def ensures(self, work: Work) -> None:
        """As many layers are sparse as were found, as many select as do not share, and no other attention core is left."""
        found, changes = work.fact(Found), work.fact(Rewritten).changes
        nodes = {node.name: node for node in work.editor.graph.nodes}
        for change in changes:
            if change.before in nodes or change.after not in nodes:
                raise BrokenPass(self.name, f"{change.name} still attends densely", change.before)
        sparse = [node for node in nodes.values() if node.target is torch.ops.mla2dsa.sparse_mla.default]
        if not len(found.sites) == len(changes) == len(sparse):
            counts = f"{len(found.sites)} sites, {len(changes)} changes, {len(sparse)} sparse attentions"
            raise BrokenPass(self.name, f"layers got lost: {counts}", sparse[-1].name if sparse else None)
        selectors = [node for node in nodes.values() if node.target is torch.ops.mla2dsa.lightning_indexer.default]
        if len(selectors) != len(sparse) - len(self._sharing(found)):
            raise BrokenPass(self.name, f"{len(selectors)} of {len(sparse)} layers select keys", selectors[-1].name)
        dense = list(iter_nodes_of(find_cores(work.editor.graph)))
        if len(dense) > len(found.misses):
            names = ", ".join(node.name for node in dense)
            raise BrokenPass(self.name, f"dense attention is left, expected {len(found.misses)}", names)

    def _sharing(self, found: Found) -> set[str]:
        """Names of the layers without an indexer. Raises UserError when there is nothing before one that it could share."""
        shared, last = self.config.shared, len(found.sites) - 1
        if wrong := [number for number in shared if not 0 < number <= last]:
            raise UserError(
                f"share: {wrong[0]} cannot share a selection: expected numbers from 1 to {last}, which count the MLA attentions as they "
                f"are run ({last} is {found.sites[last].name})"
            )
        return {found.sites[number].name for number in shared}

    def _rewrite(
        self,
        editor: ProgramEditor,
        site: MlaSite,
        shared: dict[object, Node],
        ranges: dict[Node | None, tuple[Node, Node]],
        indices: Node | None,
    ) -> tuple[Change, Node]:
        """The change, and the indices that the layer attends to. indices: those of an earlier layer, None for its own."""
        dense = site.core.out
        build = editor.builder(before=dense)
        if indices is None:
            if site.padding not in ranges:
                ranges[site.padding] = key_range(build, site)
            indices = select(build, site, self.config, self.weights.get(site.name), ranges[site.padding], shared)
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
        editor.graph.erase_node(dense)  # SDPA counts as impure: dead code elimination alone would keep it
        return Change(site.name, dense.name, out.name), indices


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
    from .pipeline import FIND  # the list of passes names this file's

    work = Work(program)
    apply_passes(work, FIND)
    return work.editor, work.fact(Found), work.fact(Functionalised).done


def mla_to_dsa(
    program: ExportedProgram,
    config: IndexerConfig,
    weights: Mapping[str, IndexerWeights] | None = None,
    allow_partial: bool = False,
) -> Converted:
    """Rewrite all MLA attention of `program` (left unchanged) into DSA.

    weights: per name of a layer that has an indexer; None declares the new parameters without values (meta tensors), to be loaded later.
    Raises UserError when no core matched, or when one was missed and `allow_partial` is not set.
    """
    from .pipeline import dsa_passes  # the list of passes names this file's

    run = run_passes(program, dsa_passes(config, weights, allow_partial))
    done, functionalised = run.fact(Rewritten), run.fact(Functionalised).done
    return Converted(run.program, run.fact(Found), done.changes, done.nodes_removed, functionalised, done.added)
