"""add_cache: give a converted program fixed-size caches, so that one graph serves prefill, chunked prefill and decode.

    key rows [B, T, R + dr]  =>  latent_i   = cache_write(past_latent_i [B, C, R + dr], key rows, slots)
    index keys [B, T, dI]    =>  index_key_i = cache_write(past_index_key_i [B, C, dI], index keys, slots)
    key range                =>  [key_begin, slots + 1)

A layer that shares the selection of an earlier one has no index keys, so it gets a latent cache only.
After `mla_to_dsa` the two DSA ops are the only ones that mix tokens, so this is all a cache has to touch. Inputs are then
input_ids, position_ids (rotary), slots (where a token lives in the cache), each [B, T], and key_begin [B] (first real
slot: 0, or the padding on the left); outputs are the logits and every present cache. attention_mask is gone: a slot above
the query's own is never seen, so stale rows, ragged batches and chunks need no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ..errors import UserError
from .graph.arguments import node_arg, operation
from .graph.editor import GraphBuilder, ProgramEditor
from .graph.graph_eval import linear_input, linear_parts, shape, value
from .manager import BrokenPass, Pass, Report, Run, Work, run_passes
from .mla_to_dsa import Rewritten

aten = torch.ops.aten
dsa = torch.ops.mla2dsa


@dataclass(frozen=True)
class CacheSpec:
    """One layer's caches: input and output names, and their row widths. index_key: None in a layer without an indexer."""

    layer: str
    latent: str
    index_key: str | None
    latent_width: int
    index_key_width: int | None

    @property
    def widths(self) -> dict[str, int]:
        """Row width of each cache by its name, in the order of the outputs."""
        keys = {} if self.index_key is None or self.index_key_width is None else {self.index_key: self.index_key_width}
        return {**keys, self.latent: self.latent_width}


@dataclass(frozen=True)
class Cached:
    """Result of `add_cache`. The program takes keyword inputs and returns (logits, {present name: cache})."""

    program: ExportedProgram
    caches: tuple[CacheSpec, ...]
    last_only: bool


@dataclass(frozen=True)
class Caches:
    """What the pass added, in graph order, and which tokens have logits."""

    specs: tuple[CacheSpec, ...]
    last_only: bool


@dataclass(frozen=True)
class AddCache(Pass):
    """last_only: logits [B, 1, vocab] at `last` [B] instead of all tokens.

    layers: names of the DSA layers in graph order; None takes them from `mla_to_dsa`, which then has to run before.
    """

    last_only: bool = False
    layers: tuple[str, ...] | None = None
    name: ClassVar[str] = "add_cache"

    def requires(self, work: Work) -> None:
        layers, attentions = self._layers(work), _attentions(work.editor)
        if len(layers) != len(attentions):
            raise UserError(f"{len(layers)} layers are named, but this program has {len(attentions)} DSA layers")
        if not any(node.name == "input_ids" for node in work.editor.user_inputs):
            raise UserError("this program has no input called input_ids, which the caches take their sizes from")

    def run(self, work: Work) -> Report:
        adder = _SparseCaches(work.editor)
        for number, (layer, attend) in enumerate(zip(self._layers(work), _attentions(work.editor), strict=True)):
            adder.cache_layer(number, layer, attend)
        if self.last_only:
            adder.keep_last()
        adder.drop_mask()
        widths = dict.fromkeys((spec.latent_width, spec.index_key_width) for spec in adder.specs)
        count = sum(len(spec.widths) for spec in adder.specs)
        return Report(
            did=(f"{count} caches added, (latent, index key) {', '.join(map(str, widths))} wide",),
            details=tuple(f"{spec.layer}: {', '.join(reversed(spec.widths))}" for spec in adder.specs),
            fact=Caches(tuple(adder.specs), self.last_only),
        )

    def ensures(self, work: Work) -> None:
        """Both DSA ops of every layer read a cache, every cache is given out, and nobody asks for a mask."""
        outputs = set(work.editor.output.all_input_nodes)
        for attend in _attentions(work.editor):
            for reader, name in ((_selector_of(attend), "k"), (attend, "kv")):
                cache = node_arg(reader, 1, name)
                if cache.target is not dsa.cache_write.default or cache not in outputs:
                    raise BrokenPass(self.name, "a DSA op reads no cache, or one that is not given out", reader.name)
        mask = next((node for node in work.editor.user_inputs if node.name == "attention_mask"), None)
        if mask is not None:
            raise BrokenPass(self.name, "the attention mask is still an input", mask.name)

    def _layers(self, work: Work) -> tuple[str, ...]:
        if self.layers is not None:
            return self.layers
        return tuple(change.name for change in work.fact(Rewritten).changes)


def _attentions(editor: ProgramEditor) -> list[Node]:
    return [node for node in editor.graph.nodes if node.target is dsa.sparse_mla.default]


def _selector_of(attend: Node) -> Node:
    return node_arg(attend, 2, "indices")


class CacheAdder:
    """What one run of a pass that adds caches shares between its layers: the new inputs, and how a cache is written."""

    def __init__(self, editor: ProgramEditor) -> None:
        self.editor = editor
        self._ids = next(n for n in editor.user_inputs if n.name == "input_ids")
        self._batch, length = value(self._ids).shape
        self._capacity = editor.new_size("cache_length")
        self.slots = editor.add_input("slots", (self._batch, length), torch.int64)
        self.begin = editor.add_input("key_begin", (self._batch,), torch.int64)

    def write(self, build: GraphBuilder, name: str, rows: Node) -> Node:
        """The cache `name` [B, C, d] with `rows` [B, T, d] in their slots: an input and an output of the program."""
        sizes = (self._batch, self._capacity, int(shape(rows)[-1]))
        past = self.editor.add_input(f"past_{name}", sizes, value(rows).dtype)
        present = build(dsa.cache_write.default, past, rows, self.slots)
        self.editor.add_output(f"present_{name}", present)
        return present

    def keep_last(self) -> None:
        """Project only the hidden state of each row's last token: prefill would write [B, T, vocab] otherwise."""
        editor = self.editor
        head = next(n for n in reversed(editor.graph.nodes) if linear_parts(n) is not None)
        hidden = linear_input(head)
        build = editor.builder(before=head)
        last = editor.add_input("last", (self._batch,), torch.int64)
        index = build(aten.view.default, last, [build.size(last, 0), 1, 1])
        index = build(aten.expand.default, index, [-1, -1, int(shape(hidden)[-1])])
        head.replace_input_with(hidden, build(aten.gather.default, hidden, 1, index))
        for node in _from(head):
            _refresh(node, editor)

    def drop_mask(self) -> None:
        """Only its sizes are still read, and input_ids has the same."""
        mask = next((n for n in self.editor.user_inputs if n.name == "attention_mask"), None)
        if mask is not None:
            for user in [u for u in mask.users if u.target is aten.sym_size.int]:
                user.replace_input_with(mask, self._ids)
        self.editor.remove_dead()
        if mask is not None:
            self.editor.drop_input(mask.name)


class _SparseCaches(CacheAdder):
    """Caches of the two DSA ops."""

    def __init__(self, editor: ProgramEditor) -> None:
        super().__init__(editor)
        self.specs: list[CacheSpec] = []
        self._ranges: dict[Any, tuple[Node, Node]] = {}
        self._cached: set[Node] = set()  # indexers that read a cache already

    def cache_layer(self, number: int, layer: str, attend: Node) -> None:
        selector, key, width = _selector_of(attend), None, None
        if selector not in self._cached:
            key, width = f"index_key_{number}", self._cache_keys(f"index_key_{number}", selector)
        query, _, *others = attend.args
        rows = node_arg(attend, 1, "kv")
        latent = self.write(self.editor.builder(before=attend), f"latent_{number}", rows)
        attend.args = (query, latent, *others)
        self.specs.append(CacheSpec(layer, f"latent_{number}", key, int(shape(rows)[-1]), width))

    def _cache_keys(self, name: str, selector: Node) -> int:
        """The width of the new cache."""
        build = self.editor.builder(before=selector)
        query, _, weights, *old_range, topk = selector.args
        keys = node_arg(selector, 1, "k")
        visible = self._range(build, tuple(old_range))
        selector.args = (query, self.write(build, name, keys), weights, *visible, topk)
        _refresh(selector, self.editor)
        self._cached.add(selector)
        return int(shape(keys)[-1])

    def _range(self, build: GraphBuilder, old: object) -> tuple[Node, Node]:
        """(key_begin, key_end), [B, T], once for all layers that shared theirs before."""
        if old not in self._ranges:
            sizes = [build.size(self.slots, 0), build.size(self.slots, 1)]
            first = build(aten.expand.default, build(aten.unsqueeze.default, self.begin, 1), sizes)
            self._ranges[old] = first, build(aten.add.Tensor, self.slots, 1)
        return self._ranges[old]


def _from(start: Node) -> list[Node]:
    found, node = [], start
    while node.op == "call_function":
        found.append(node)
        node = node.next
    return found


def _refresh(node: Node, editor: ProgramEditor) -> None:
    """Recompute a fake value after the node's inputs changed shape."""
    with editor.fake_mode:
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), value)
        node.meta["val"] = operation(node)(*args, **kwargs)


def add_cache(program: ExportedProgram, layers: Sequence[str], last_only: bool = False) -> Cached:
    """`program` (from `mla_to_dsa`, left unchanged) with caches; `layers` names its DSA layers in graph order."""
    return cached_of(run_passes(program, [AddCache(last_only, tuple(layers))]))


def cached_of(run: Run) -> Cached:
    """The result of any passes that ended with this one."""
    caches = run.fact(Caches)
    return Cached(run.program, caches.specs, caches.last_only)
