"""add_cache: give a converted program fixed-size caches, so that one graph serves prefill, chunked prefill and decode.

    key rows [B, T, R + dr]  =>  latent_i   = cache_write(past_latent_i [B, C, R + dr], key rows, slots)
    index keys [B, T, dI]    =>  index_key_i = cache_write(past_index_key_i [B, C, dI], index keys, slots)
    key range                =>  [key_begin, slots + 1)

After `mla_to_dsa` the two DSA ops are the only ones that mix tokens, so this is all a cache has to touch. Inputs are then
input_ids, position_ids (rotary), slots (where a token lives in the cache), each [B, T], and key_begin [B] (first real
slot: 0, or the padding on the left); outputs are the logits and every present cache. attention_mask is gone: a slot above
the query's own is never seen, so stale rows, ragged batches and chunks need no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .graph.arguments import node_arg, operation
from .graph.editor import GraphBuilder, ProgramEditor
from .graph.graph_eval import linear_input, linear_parts, shape, value

aten = torch.ops.aten
dsa = torch.ops.mla2dsa


@dataclass(frozen=True)
class CacheSpec:
    """One layer's caches: input and output names, and their row widths."""

    layer: str
    latent: str
    index_key: str
    latent_width: int
    index_key_width: int


@dataclass(frozen=True)
class Cached:
    """Result of `add_cache`. The program takes keyword inputs and returns (logits, {present name: cache})."""

    program: ExportedProgram
    caches: tuple[CacheSpec, ...]
    last_only: bool


class AddCache(PassBase):
    """The pass over an editor's graph module. last_only: logits [B, 1, vocab] at `last` [B] instead of all tokens."""

    def __init__(self, editor: ProgramEditor, layers: list[str], last_only: bool) -> None:
        self._editor, self._layers, self._last_only = editor, layers, last_only
        self.caches: list[CacheSpec] = []

    def call(self, graph_module: GraphModule) -> PassResult:
        editor = self._editor
        ids = next(n for n in editor.user_inputs if n.name == "input_ids")
        batch, length = value(ids).shape
        self._capacity = editor.new_size("cache_length")
        self._batch = batch
        slots = editor.add_input("slots", (batch, length), torch.int64)
        begin = editor.add_input("key_begin", (batch,), torch.int64)
        selectors = [n for n in editor.graph.nodes if n.target is dsa.lightning_indexer.default]
        ranges: dict[Any, tuple[Node, Node]] = {}
        for number, (layer, selector) in enumerate(zip(self._layers, selectors, strict=True)):
            self._cache_layer(number, layer, selector, slots, begin, ranges)
        if self._last_only:
            self._keep_last()
        self._drop_mask(ids)
        return PassResult(graph_module, True)

    def _drop_mask(self, ids: Node) -> None:
        """Only its sizes are still read, and input_ids has the same."""
        mask = next((n for n in self._editor.user_inputs if n.name == "attention_mask"), None)
        if mask is not None:
            for user in [u for u in mask.users if u.target is aten.sym_size.int]:
                user.replace_input_with(mask, ids)
        self._editor.remove_dead()
        if mask is not None:
            self._editor.drop_input(mask.name)

    def _cache_layer(
        self, number: int, layer: str, selector: Node, slots: Node, begin: Node, ranges: dict[Any, tuple[Node, Node]]
    ) -> None:
        editor = self._editor
        build = editor.builder(before=selector)
        attend = next(user for user in selector.users if user.target is dsa.sparse_mla.default)
        query, _, weights, old_begin, old_end, topk = selector.args
        keys, rows = node_arg(selector, 1, "k"), node_arg(attend, 1, "kv")
        if (old_begin, old_end) not in ranges:
            sizes = [build.size(slots, 0), build.size(slots, 1)]
            first = build(aten.expand.default, build(aten.unsqueeze.default, begin, 1), sizes)
            ranges[old_begin, old_end] = first, build(aten.add.Tensor, slots, 1)
        index_key = self._write(build, f"index_key_{number}", keys, slots)
        selector.args = (query, index_key, weights, *ranges[old_begin, old_end], topk)
        _refresh(selector, editor)
        rows_query, _, *others = attend.args
        latent = self._write(editor.builder(before=attend), f"latent_{number}", rows, slots)
        attend.args = (rows_query, latent, *others)
        widths = int(shape(rows)[-1]), int(shape(keys)[-1])
        self.caches.append(CacheSpec(layer, f"latent_{number}", f"index_key_{number}", *widths))

    def _write(self, build: GraphBuilder, name: str, rows: Node, slots: Node) -> Node:
        editor = self._editor
        past = editor.add_input(f"past_{name}", (self._batch, self._capacity, int(shape(rows)[-1])), value(rows).dtype)
        present = build(dsa.cache_write.default, past, rows, slots)
        editor.add_output(f"present_{name}", present)
        return present

    def _keep_last(self) -> None:
        """Project only the hidden state of each row's last token: prefill would write [B, T, vocab] otherwise."""
        editor = self._editor
        head = next(n for n in reversed(editor.graph.nodes) if linear_parts(n) is not None)
        hidden = linear_input(head)
        build = editor.builder(before=head)
        last = editor.add_input("last", (self._batch,), torch.int64)
        index = build(aten.view.default, last, [build.size(last, 0), 1, 1])
        index = build(aten.expand.default, index, [-1, -1, int(shape(hidden)[-1])])
        head.replace_input_with(hidden, build(aten.gather.default, hidden, 1, index))
        for node in _from(head):
            _refresh(node, editor)


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


def add_cache(program: ExportedProgram, layers: list[str], last_only: bool = False) -> Cached:
    """`program` (from `mla_to_dsa`, left unchanged) with caches; `layers` names its DSA layers in graph order."""
    editor = ProgramEditor(program)
    cached = AddCache(editor, layers, last_only)
    cached(editor.module)
    return Cached(editor.finish(), tuple(cached.caches), last_only)
