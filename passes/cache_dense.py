"""cache_dense: give a dense program caches, and leave its attention as it is.

    keys [B, H, T, d]     =>  key_i   = cache_write(past_key_i [B, C, H d], rows of the keys, slots)
    values [B, H, T, dv]  =>  value_i = cache_write(past_value_i [B, C, H dv], rows of the values, slots)
    mask                  =>  key_begin <= slot of the key <= slot of the query

What a dense model answers is compared with what its DSA one does, so its attention stays the captured one: nothing is absorbed, and
keys and values are kept as the model makes them. That takes more room than a latent; it is for comparing, not for serving.
Inputs and outputs are those of `add_cache`, with these caches in place of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ..errors import UserError
from ..kernels import anchors  # noqa: F401  (registers dense_attention)
from .add_cache import CacheAdder
from .graph.editor import GraphBuilder
from .graph.graph_eval import shape, value
from .manager import BrokenPass, Pass, Report, Run, Work
from .matching.sites import Core, Found

aten = torch.ops.aten
ATTENTION = torch.ops.mla2dsa.dense_attention.default


@dataclass(frozen=True)
class DenseCacheSpec:
    """One layer's caches: their names, and the widths of their rows."""

    layer: str
    key: str
    value: str
    key_width: int
    value_width: int

    @property
    def widths(self) -> dict[str, int]:
        """Row width of each cache by its name, in the order of the outputs."""
        return {self.key: self.key_width, self.value: self.value_width}


@dataclass(frozen=True)
class DenseCached:
    """A dense program with caches. It takes keyword inputs and returns (logits, {present name: cache})."""

    program: ExportedProgram
    caches: tuple[DenseCacheSpec, ...]


@dataclass(frozen=True)
class DenseCaches:
    """What the pass added, in graph order."""

    specs: tuple[DenseCacheSpec, ...]


@dataclass(frozen=True)
class CacheDense(Pass):
    """last_only: logits [B, 1, vocab] at `last` [B] instead of all tokens. layers: how many the model has.

    Every attention has to be one that `find_mla` read: that is how it is known that its mask is causal and nothing else.
    """

    last_only: bool = False
    layers: int = 0
    name: ClassVar[str] = "cache_dense"

    def requires(self, work: Work) -> None:
        found = work.fact(Found)
        if found.misses or not found.sites:
            why = found.misses[0] if found.misses else "no attention was found"
            raise UserError(f"{why}: a graph with caches is made of causal MLA attention only")
        if len(found.sites) < self.layers:
            raise UserError(
                f"{len(found.sites)} of {self.layers} layers are MLA; the others keep a state between tokens that a graph with "
                "caches has no place for yet: such a model is converted and verified, but not run"
            )
        if strange := [site for site in found.sites if site.core.kind != "anchor"]:
            raise UserError(f"{strange[0].name}: attention is captured as {strange[0].core.kind}, expected anchor")

    def run(self, work: Work) -> Report:
        adder = _DenseCaches(work.editor)
        for number, site in enumerate(work.fact(Found).sites):
            adder.cache_layer(number, site.name, site.core)
        if self.last_only:
            adder.keep_last()
        adder.drop_mask()
        widths = dict.fromkeys((spec.key_width, spec.value_width) for spec in adder.specs)
        return Report(
            did=(f"{2 * len(adder.specs)} caches added, (key, value) {', '.join(map(str, widths))} wide",),
            details=tuple(f"{spec.layer}: {', '.join(spec.widths)}" for spec in adder.specs),
            fact=DenseCaches(tuple(adder.specs)),
        )

    def ensures(self, work: Work) -> None:
        """As many attentions as before, each on caches that are given out; nobody asks for a mask."""
        attends = [node for node in work.editor.graph.nodes if node.target is ATTENTION]
        if len(attends) != len(work.fact(DenseCaches).specs):
            raise BrokenPass(self.name, f"{len(attends)} attentions are left", attends[-1].name if attends else None)
        mask = next((node for node in work.editor.user_inputs if node.name == "attention_mask"), None)
        if mask is not None:
            raise BrokenPass(self.name, "the attention mask is still an input", mask.name)


class _DenseCaches(CacheAdder):
    """Caches of plain attention, and the mask that goes with them."""

    specs: tuple[DenseCacheSpec, ...] = ()
    _visible: Node | None = None

    def cache_layer(self, number: int, layer: str, core: Core) -> None:
        build = self.editor.builder(before=core.out)
        key, keys = self._cached(build, f"key_{number}", core.k)
        val, values = self._cached(build, f"value_{number}", core.v)
        spec = DenseCacheSpec(layer, f"key_{number}", f"value_{number}", key, val)
        if self._visible is None:
            self._visible = self._mask(build, keys)
        attended = build(ATTENTION, core.q, keys, values, self._visible, float(core.scale))
        core.out.replace_all_uses_with(attended)
        self.editor.graph.erase_node(core.out)
        self.specs = (*self.specs, spec)

    def _cached(self, build: GraphBuilder, name: str, new: Node) -> tuple[int, Node]:
        """(row width, what is in the cache [B, H, C, d]) with `new` [B, H, T, d] written to it."""
        heads, width = int(shape(new)[1]), int(shape(new)[3])
        sizes = [build.size(new, 0), build.size(new, 2), heads * width]
        rows = build(aten.reshape.default, build(aten.transpose.int, new, 1, 2), sizes)
        cache = self.write(build, name, rows)
        split = [build.size(cache, 0), build.size(cache, 1), heads, width]
        return heads * width, build(aten.transpose.int, build(aten.view.default, cache, split), 1, 2)

    def _mask(self, build: GraphBuilder, keys: Node) -> Node:
        """[B, 1, T, C] bool, True where a query may see a slot."""
        slot = build(aten.arange.default, build.size(keys, 2), dtype=torch.int64, device=value(keys).device)
        mine = build(aten.unsqueeze.default, build(aten.unsqueeze.default, self.slots, 1), -1)  # [B, 1, T, 1]
        first = build(aten.view.default, self.begin, [build.size(self.begin, 0), 1, 1, 1])
        before = build(aten.le.Tensor, slot, mine)
        return build(aten.logical_and.default, before, build(aten.ge.Tensor, slot, first))


def dense_cached_of(run: Run) -> DenseCached:
    """The result of any passes that ended with this one."""
    return DenseCached(run.program, run.fact(DenseCaches).specs)
