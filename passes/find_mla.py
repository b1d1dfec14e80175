"""find_mla: every dense causal MLA attention of a program, found by data flow and proved by execution.

        hidden --linear kv_a--> [latent | k_pe] --norm--> latent --linear kv_b--> K_nope, V      K = [K_nope | rope(k_pe)]
        hidden --linear q_a--> norm --> q_resid --linear q_b--> q --> core(q, K, V, causal mask)

Start at each attention core. 1. Behind K and V, through ops that only move data, there must be exactly one linear layer
(kv_b) and one more tensor shared by all heads (k_pe). 2. That movement is run with integer tags at two shapes: the result
*is* the index map (heads, nope/v split, order of rows, place of the rope part); nothing is spelled. 3. latent, k_pe and q
must come from one hidden state. 4. The mask must evaluate to causal & key padding. Names are reported, never trusted.
Whatever fails comes back as a `Miss` with the reason and the node to blame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, Node

from .graph.arguments import UnexpectedArgument, int_arg, node_arg
from .graph.graph_eval import (
    BLANK,
    CASTS,
    END,
    CannotEvaluate,
    concrete_shape,
    evaluate,
    integers,
    is_move,
    is_tensor,
    linear_input,
    linear_parts,
    nearest_linears,
    node_symbols,
    shape,
    symbols,
)
from .manager import BrokenPass, Pass, Report, Work
from .matching.cores import find_cores, iter_nodes_of
from .matching.mask import LONGEST_PROBE, MaskProver
from .matching.rope import read_k_pe
from .matching.sites import Core, Found, Miss, MlaDims, MlaSite, NoMatch
from .matching.writes import WriteGuard

aten = torch.ops.aten

# Ops that take a part of one axis, and where they say which axis.
_CUTS: dict[object, int] = {
    aten.slice.Tensor: 1, aten.narrow.default: 1, aten.select.int: 1, aten.slice_scatter.default: 2,
    aten.select_scatter.default: 2, aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2,
}  # fmt: skip
_BROADCASTS = {
    aten.expand.default,
    aten.unsqueeze.default,
    aten.repeat_interleave.self_int,
    aten.clone.default,
    aten.alias.default,
}


def find_mla(program: ExportedProgram) -> Found:
    """All attention cores of `program`: matched ones as `MlaSite`, the others as `Miss`. The program is not changed."""
    return find_mla_in(program.graph, program.graph_signature, program.constants)


@dataclass(frozen=True)
class FindMla(Pass):
    """The same as a step of a pipeline: the graph stays as it is, `Found` is its fact."""

    name: ClassVar[str] = "find_mla"

    def requires(self, work: Work) -> None:
        """Any exported program."""

    def run(self, work: Work) -> Report:
        editor = work.editor
        found = find_mla_in(editor.graph, editor.signature, editor.constants)
        names = [site.name for site in found.sites]
        return Report(
            did=(f"{len(names)} MLA attentions found" + (f", {names[0]} to {names[-1]}" if names else ""),),
            could_not=tuple(f"match {miss}" for miss in found.misses),
            details=tuple(
                f"{site.name}: {site.core.kind} core {site.core.out.name}, {site.dims}" for site in found.sites
            ),
            fact=found,
        )

    def ensures(self, work: Work) -> None:
        """Every attention core is a site or a miss, once."""
        found = work.fact(Found)
        judged = sorted([*(site.index for site in found.sites), *(miss.index for miss in found.misses)])
        for index, core in enumerate(iter_nodes_of(find_cores(work.editor.graph))):
            if index >= len(judged) or judged[index] != index:
                raise BrokenPass(self.name, "an attention is neither matched nor missed", core.name)


def find_mla_in(graph: Graph, signature: ExportGraphSignature, constants: Mapping[str, object]) -> Found:
    names = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
    given, constant_names = set(signature.user_inputs), signature.inputs_to_lifted_tensor_constants
    placeholders = graph.find_nodes(op="placeholder")
    user_inputs = [n for n in placeholders if n.name in given]
    lifted = {
        n: value.cpu()
        for n in placeholders
        if isinstance(value := constants.get(constant_names.get(n.name, "")), Tensor) and value.device.type != "meta"
    }
    matcher = _Matcher(MaskProver(user_inputs, lifted), WriteGuard(graph), names)
    sites: list[MlaSite] = []
    misses: list[Miss] = []
    for index, core in enumerate(find_cores(graph)):
        node = core.out if isinstance(core, Core) else core[0]
        try:
            if not isinstance(core, Core):
                raise NoMatch(core[1], core[0])
            sites.append(matcher.match(core, index))
        except (NoMatch, UnexpectedArgument) as miss:
            misses.append(Miss(_module_path(node, index), index, str(miss), (miss.node or node).name))
    return Found(tuple(sites), tuple(misses))


def _module_path(node: Node, index: int) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(stack.values())), "")
    return path or f"attention {index}"


class _Matcher:
    def __init__(self, masks: MaskProver, writes: WriteGuard, names: Mapping[str, str]) -> None:
        self._masks, self._writes, self._names = masks, writes, names

    def match(self, core: Core, index: int) -> MlaSite:
        for operand in (core.q, core.k, core.v):
            if len(shape(operand)) != 4:
                raise NoMatch("queries, keys and values are not [batch, heads, tokens, channels]", operand)
        self._writes.check([core.q, core.k, core.v], core.mask)
        behind = _behind_keys_and_values(core)
        latent, weight = behind.latent, behind.weight
        layout = _prove_layout(core, behind)
        kv_a, hidden = _shared_projection(latent, behind.k_pe)
        rope, k_pe_rows = read_k_pe(behind.k_pe, kv_a)
        q_b, q_resid = _query_path(core.q, hidden)
        self._writes.check_aliases([latent, hidden, *([q_resid] if q_resid else [])])
        padding = self._masks.padding_input(core)
        path = (
            self._names[weight.name].rsplit(".", 2)[0] if weight.name in self._names else _module_path(core.out, index)
        )
        dims = MlaDims(
            hidden_size=int(shape(hidden)[-1]),
            num_heads=layout.uk_rows.shape[0],
            q_lora_rank=int(shape(q_resid)[-1]) if q_resid is not None else None,
            kv_lora_rank=int(shape(latent)[-1]),
            qk_nope_head_dim=layout.uk_rows.shape[1],
            qk_rope_head_dim=layout.rope_dim,
            v_head_dim=layout.uv_rows.shape[1],
        )
        return MlaSite(
            name=path, index=index, dims=dims, core=core, hidden=hidden, q_resid=q_resid, q_b=q_b,
            kv_a=kv_a, kv_b_weight=weight, latent=latent, k_pe=behind.k_pe, rope=rope, uk_rows=layout.uk_rows,
            uv_rows=layout.uv_rows, k_pe_rows=k_pe_rows, rope_first=layout.rope_first, padding=padding,
        )  # fmt: skip


@dataclass(frozen=True)
class _Behind:
    kv_b: Node
    latent: Node
    weight: Node
    k_pe: Node


@dataclass(frozen=True)
class _Layout:
    uk_rows: Tensor
    uv_rows: Tensor
    rope_dim: int
    rope_first: bool


def _movement(root: Node) -> tuple[dict[Node, None], dict[Node, None]]:
    """(nodes that only move data behind `root`, the tensors they move); uninitialised memory is neither."""
    moving: dict[Node, None] = {}
    leaves: dict[Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node in moving or node in leaves or not (is_tensor(node) or isinstance(node.meta.get("val"), tuple | list)):
            continue
        if not is_move(node):
            leaves[node] = None
            continue
        moving[node] = None
        if node.target not in BLANK:
            stack.extend(node.all_input_nodes)
    return moving, leaves


def _behind_keys_and_values(core: Core) -> _Behind:
    moving_k, leaves_k = _movement(core.k)
    _, leaves_v = _movement(core.v)
    ups = [(leaf, parts) for leaf in leaves_v if (parts := linear_parts(leaf))]
    if len(leaves_v) != 1 or len(ups) != 1:
        kinds = ", ".join(sorted({str(leaf.target) for leaf in leaves_v}))
        raise NoMatch(f"values are not one projection's output moved around (they come from {kinds})", core.v)
    kv_b, (latent, weight, bias) = ups[0]
    if kv_b not in leaves_k:
        raise NoMatch("keys and values do not share one up-projection: not MLA", core.k)
    if bias is not None:
        raise NoMatch("the latent's up-projection has a bias", kv_b)
    return _Behind(kv_b, latent, weight, _shared_key(core.k, kv_b, moving_k))


def _shared_key(key: Node, kv_b: Node, moving: dict[Node, None]) -> Node:
    """The one part of K that does not come from the latent, before it is broadcast over heads."""
    from_latent = {kv_b: True}

    def depends(node: Node) -> bool:
        stack = [node]
        while stack:
            current = stack[-1]
            if current in from_latent:
                stack.pop()
                continue
            inputs = [] if current not in moving or current.target in BLANK else current.all_input_nodes
            todo = [n for n in inputs if n not in from_latent]
            if todo:
                stack.extend(todo)
                continue
            from_latent[current] = any(from_latent[n] for n in inputs)
            stack.pop()
        return from_latent[node]

    depends(key)
    frontier = {
        source: None
        for node in moving
        if from_latent.get(node) and node.target not in BLANK
        for source in node.all_input_nodes
        if is_tensor(source) and not from_latent.get(source) and not _is_blank(source, moving)
    }
    if len(frontier) != 1:
        raise NoMatch(f"keys have {len(frontier)} parts that do not come from the latent, expected one (k_pe)", key)
    k_pe = next(iter(frontier))
    while k_pe in moving and k_pe.target in _BROADCASTS:
        k_pe = node_arg(k_pe, 0, "self")
    return k_pe


def _is_blank(node: Node, moving: dict[Node, None]) -> bool:
    """A view of memory that is only going to be written."""
    while node in moving and node.target not in BLANK and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target in BLANK


def _prove_layout(core: Core, behind: _Behind) -> _Layout:
    first = _tag_run(core, behind, batch=2, tokens=3)
    cut = _longest_cut(core)
    if cut > LONGEST_PROBE:
        raise NoMatch(f"keys or values are cut at token {cut}: too long to probe", core.k)
    for tokens in (2,) if cut < 2 else (2, cut + 5):
        again = _tag_run(core, behind, batch=1, tokens=tokens)
        same = torch.equal(first.uk_rows, again.uk_rows) and torch.equal(first.uv_rows, again.uv_rows)
        if not same or (first.rope_dim, first.rope_first) != (again.rope_dim, again.rope_first):
            raise NoMatch("how keys and values are laid out depends on the shape", core.k)
    queries = shape(core.q)
    heads, width = first.uk_rows.shape[0], first.uk_rows.shape[1] + first.rope_dim
    if (queries[1], queries[3]) != (heads, width):
        raise NoMatch(f"queries have {queries[1]} heads of {queries[3]}, keys {heads} of {width}", core.q)
    if str(queries[2]) != str(shape(core.k)[2]):
        raise NoMatch(f"{queries[2]} queries but {shape(core.k)[2]} keys: capture without a cache", core.k)
    return first


def _longest_cut(core: Core) -> int:
    """The largest number at which the movement cuts a dynamic axis: what it does to later tokens shows only past it."""
    numbers = [0]
    for node in [*_movement(core.k)[0], *_movement(core.v)[0]]:
        at = _CUTS.get(node.target)
        if at is None:
            continue
        axis = int_arg(node, at, "dim", default=0)
        if symbols(shape(node_arg(node, 0, "self"))[axis]):
            numbers += [abs(n) for n in integers([*node.args[1:at], *node.args[at + 1 :]]) if abs(n) < END]
    return max(numbers)


def _tag_run(core: Core, behind: _Behind, batch: int, tokens: int) -> _Layout:
    """Run the movement on unique integers: entry [b, h, s, j] of K and V then names what it is."""
    rank = len(shape(behind.kv_b))
    dynamic = [i for i in range(1, rank - 1) if symbols(shape(behind.kv_b)[i])]
    if len(dynamic) != 1:
        raise NoMatch("the latent has no single dynamic token axis: export with a dynamic sequence", behind.kv_b)
    env = dict.fromkeys(node_symbols([*_movement(core.k)[0], *_movement(core.v)[0], behind.kv_b]), tokens)
    env |= dict.fromkeys(symbols(shape(behind.kv_b)[0]), batch)
    try:
        sizes = concrete_shape(behind.kv_b, env)
        batch, tokens, width = sizes[0], sizes[dynamic[0]], sizes[-1]
        rope_sizes = concrete_shape(behind.k_pe, env)
        rope_dim = rope_sizes[-1]
        latent_tags = torch.arange(batch * tokens * width, dtype=torch.float64).view(sizes)
        rope_count = batch * tokens * rope_dim
        if torch.Size(rope_sizes).numel() != rope_count:
            raise NoMatch("k_pe is not one key shared by all heads", behind.k_pe)
        rope_tags = -1.0 - torch.arange(rope_count, dtype=torch.float64).view(rope_sizes)
        feed = {behind.kv_b: latent_tags, behind.k_pe: rope_tags}
        for node in [*_movement(core.k)[0], *_movement(core.v)[0]]:
            if node.target in BLANK:  # zeros, too, are not a tag
                feed[node] = torch.full(concrete_shape(node, env), float("nan"), dtype=torch.float64)
        keys, values = evaluate([core.k, core.v], feed, env)
    except (CannotEvaluate, RuntimeError) as error:
        raise NoMatch(f"keys and values cannot be laid out ({str(error).splitlines()[0]})", core.k) from error
    return _read_tags(core, keys, values, batch, tokens, width, rope_dim)


def _read_tags(core: Core, keys: Tensor, values: Tensor, batch: int, tokens: int, width: int, rope_dim: int) -> _Layout:
    if keys.shape[0] != batch or keys.shape[2] != tokens or values.shape[:3] != keys.shape[:3]:
        raise NoMatch("keys are not [batch, heads, tokens, channels], or values have other heads", core.k)
    if bool(keys.isnan().any()) or bool(values.isnan().any()):
        raise NoMatch("memory that was never filled reaches the keys or values", core.k)
    is_rope = keys < 0
    columns = is_rope[0, 0, 0]
    at = columns.nonzero().flatten().tolist()
    if not bool((is_rope == columns).all()) or len(at) != rope_dim:
        raise NoMatch("k_pe does not fill the same channels in every head and token", core.k)
    rope_first = at[0] == 0
    if at != list(range(at[0], at[0] + rope_dim)) or not (rope_first or at[-1] == keys.shape[3] - 1):
        raise NoMatch("k_pe's channels are not at one end of the key", core.k)
    wanted = torch.arange(batch * tokens * rope_dim).view(batch, 1, tokens, rope_dim)
    if not torch.equal(-1 - keys[..., columns].long(), wanted.expand(-1, keys.shape[1], -1, -1)):
        raise NoMatch("k_pe is not the same for every head, or its tokens are moved", core.k)
    return _Layout(
        _rows(keys[..., ~columns], batch, tokens, width, core.k, "keys"),
        _rows(values, batch, tokens, width, core.v, "values"),
        rope_dim,
        rope_first,
    )


def _rows(tags: Tensor, batch: int, tokens: int, width: int, node: Node, what: str) -> Tensor:
    """[H, d] rows of kv_b; every token must take its own."""
    start = (torch.arange(batch).view(-1, 1, 1, 1) * tokens + torch.arange(tokens).view(1, 1, -1, 1)) * width
    rows = tags.long() - start
    if bool((rows < 0).any()) or bool((rows >= width).any()) or not bool((rows == rows[:1, :, :1]).all()):
        raise NoMatch(f"{what} mix tokens (a shift or a convolution over time)", node)
    return rows[0, :, 0]


def _shared_projection(latent: Node, k_pe: Node) -> tuple[Node, Node]:
    """(kv_a, hidden): the projection both the latent and k_pe come from, and what it reads."""
    for part, node in (("the latent", latent), ("k_pe", k_pe)):
        if len(nearest_linears(node)) != 1:
            raise NoMatch(f"{part} comes from {len(nearest_linears(node))} projections, expected one", node)
    kv_a, rope_a = nearest_linears(latent)[0], nearest_linears(k_pe)[0]
    if kv_a is not rope_a:
        raise NoMatch("the latent and k_pe come from different projections: not MLA", k_pe)
    hidden = linear_input(kv_a)
    if len(shape(hidden)) != 3:
        raise NoMatch("the hidden state is not [batch, tokens, hidden_size]", hidden)
    return kv_a, hidden


def _query_path(query: Node, hidden: Node) -> tuple[Node | None, Node | None]:
    """(q_b, q_resid): the last query projection, and the normed latent it reads (None when it reads the hidden state)."""
    projections = nearest_linears(query)
    if len(projections) != 1:
        raise NoMatch(f"queries come from {len(projections)} projections, expected one", query)
    source = linear_input(projections[0])
    if _uncast(source) is _uncast(hidden):
        return projections[0], None
    below = nearest_linears(source)
    if len(below) == 1 and _uncast(linear_input(below[0])) is _uncast(hidden):
        return projections[0], source
    raise NoMatch("queries and latent do not start at the same hidden state", query)


def _uncast(node: Node) -> Node:
    while node.op == "call_function" and node.target in CASTS and is_move(node):
        node = node_arg(node, 0, "self")
    return node
