"""Sparse attention of a long sequence, a tile of queries at a time.

What `passes/building/absorb.py` puts around `sparse_mla` is several times as large as what goes in and comes out:

    q_nope [B,H,T,dn] -> absorbed [B,H,T,R] -> rows [B,T,H,R+dr] -> attended [B,T,H,R] -> heads [B,H,T,dv]

Every row of it follows from its own query alone, so that between the first and the last no value has to be whole. Where the queries
themselves come from a linear layer by what `axis.py` knows, they need not be, either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...compat.aliasing import Memory
from ...kernels import ops  # noqa: F401  registers what is named below
from ...kernels.products import matmul
from ...passes.graph.graph_eval import nearest_linears, value
from .axis import Apply, Follows, Known, fixed_width, followed, length_of, readers, run_part, undisturbed

aten = torch.ops.aten
SPARSE_MLA = torch.ops.mla2dsa.sparse_mla.default
# benchmarks/memory.py --rows: 256 to 2048 queries at a time take the same time; at 128 heads of DeepSeek-V3's width 320 have this.
TILE_BYTES = 256 * 2**20
LEAST_ROWS = 64  # fixed by what it costs: 52 MB a sequence at 128 heads


@dataclass(frozen=True)
class Chain:
    """around: nodes around the attention whose values are never whole; out: the one after them, whose value is [B,H,T,dv]; queries: nodes
    that make q_nope and q_rope of a tile, in their order, and how."""

    around: tuple[Node, ...]
    out: Node
    q_nope: Node
    q_rope: Node
    key_up: Node
    attention: Node
    value_up: Node
    queries: Known = field(default_factory=dict)

    @property
    def inside(self) -> list[Node]:
        """Nodes that are not run by themselves."""
        return [*self.queries, *self.around]

    @property
    def width(self) -> int:
        """Channels of one head and query, in all that is made."""
        heads, _, latent = value(self.key_up).shape
        return int(3 * latent + value(self.q_rope).shape[-1] + (fixed_width(self.queries) or 0) // heads)

    @property
    def exits(self) -> tuple[Node]:
        """Those whose values others see."""
        return (self.out,)

    def run(self, env: Mapping[Node, Any], apply: Apply) -> dict[Node, Any]:
        """Values of `exits`. apply: (node, arguments, keywords) -> what the node is, of those."""
        return {self.out: run(self, env, apply)}


def chains_in(nodes: Sequence[Node], memory: Memory, watched: Collection[str] = ()) -> list[Chain]:
    """Those that are all among `nodes`, and of which nobody is shown anything inside. watched: names of nodes."""
    found = (_chain(node) for node in nodes if node.target is SPARSE_MLA)
    return [
        _with_queries(chain, nodes, memory, watched)
        for chain in found
        if chain is not None and _apart(chain, nodes, memory, watched)
    ]


def cached_chains_in(nodes: Sequence[Node], memory: Memory, watched: Collection[str] = ()) -> list[Chain]:
    """The same in a program with caches, whose keys are more than its queries; without what makes the queries."""
    found = [_chain(node, cached=True) for node in nodes if node.target is SPARSE_MLA]
    return [chain for chain in found if chain is not None and _apart(chain, nodes, memory, watched)]


def _apart(chain: Chain, nodes: Sequence[Node], memory: Memory, watched: Collection[str]) -> bool:
    """It is all among `nodes`, and nobody sees what is inside, or is shown it."""
    return (
        set(nodes).issuperset((*chain.around, chain.out))
        and not any(node.name in watched for node in chain.around)
        and undisturbed((*chain.around, chain.out), (chain.out,), chain.out, nodes, memory)
    )


def _with_queries(chain: Chain, nodes: Sequence[Node], memory: Memory, watched: Collection[str]) -> Chain:
    """And what makes its queries, from the linear layers on, where a query follows from its own token and nobody else reads it."""
    own, length = set(nodes), length_of(chain.q_nope, 2)
    entries = {
        linear: Follows(axis, sliced={x: axis})
        for part in (chain.q_nope, chain.q_rope) for linear in nearest_linears(part)
        for x in linear.args[:1]
        if isinstance(x, Node) and (axis := value(x).ndim - 2) >= 0 and length_of(x, axis) == length
    }  # fmt: skip
    if not entries or not own.issuperset(entries):
        return chain
    how = followed(entries, nodes, chain.out, length, chain.around)
    if how is None or not all(part in how and how[part].axis == 2 for part in (chain.q_nope, chain.q_rope)):
        return chain
    whole = replace(chain, queries=how)
    return (
        whole
        if _alone(whole, nodes, watched)
        and undisturbed((*whole.inside, chain.out), (chain.out,), chain.out, nodes, memory)
        else chain
    )


def _alone(chain: Chain, nodes: Sequence[Node], watched: Collection[str]) -> bool:
    """Nothing but its two queries goes from what makes them to the attention, or anywhere else."""
    before, queries = set(nodes[: nodes.index(chain.out)]), chain.queries
    absorbed, joined = chain.around[:2]
    readers_of = {chain.q_nope: {absorbed}, chain.q_rope: {joined}}
    return (
        before.issuperset(queries)
        and fixed_width(queries) is not None
        and all(set(readers(node, queries)) <= readers_of.get(node, set()) for node in queries)
        and not any(node.name in watched for node in queries)
    )


def _chain(attention: Node, cached: bool = False) -> Chain | None:
    """What `query_rows` and `value_heads` made around it; None where it is not that, or somebody else reads a part. cached: its keys may
    be others than those of its queries."""
    rows, after = attention.args[0], _only_user(attention, aten.transpose.int)
    out = _only_user(after, aten.matmul.default)
    if not (isinstance(rows, Node) and rows.target is aten.transpose.int and after is not None and out is not None):
        return None
    joined = rows.args[0]
    if not (
        isinstance(joined, Node) and joined.target is aten.cat.default and isinstance(joined.args[0], list | tuple)
    ):
        return None
    parts = list(joined.args[0])
    absorbed = parts[0]
    if len(parts) != 2 or not isinstance(absorbed, Node) or absorbed.target is not aten.matmul.default:
        return None
    inside = (absorbed, joined, rows, attention, after)
    if any(len(node.users) != 1 for node in inside) or out.args[0] is not after:
        return None
    (q_nope, key_up), q_rope, value_up = absorbed.args, parts[1], out.args[1]
    ranks = [(q_nope, 4), (q_rope, 4), (key_up, 3), (value_up, 3), *zip(attention.args[1:3], (3, 3), strict=True)]
    if not all(isinstance(node, Node) and getattr(value(node), "ndim", 0) == rank for node, rank in ranks):
        return None
    kv, indices = attention.args[1:3]
    own_keys = length_of(kv, 1) == length_of(indices, 1) and not isinstance(length_of(kv, 1), int)  # type: ignore[arg-type]
    if not (own_keys or cached):
        return None
    if not _usual_dims(rows, after, joined):
        return None
    return Chain(inside, out, q_nope, q_rope, key_up, attention, value_up)  # type: ignore[arg-type]


def _usual_dims(rows: Node, after: Node, joined: Node) -> bool:
    """Tokens and heads change places, before and after; channels are put one after the other."""
    turned = all({dim % 4 for dim in node.args[1:]} == {1, 2} for node in (rows, after))  # type: ignore[operator]
    dim = joined.args[1] if len(joined.args) > 1 else 0
    return turned and not joined.kwargs and dim in (-1, 3)


def _only_user(node: Node | None, target: Any) -> Node | None:
    user = next(iter(node.users), None) if node is not None and len(node.users) == 1 else None
    return user if user is not None and user.target is target else None


def tile_rows(batch: int, heads: int, width: int, itemsize: int = 4) -> int:
    """Queries at a time. width: of a `Chain`."""
    rows = TILE_BYTES // (batch * heads * width * itemsize)
    return max(LEAST_ROWS, rows // LEAST_ROWS * LEAST_ROWS)


def run(chain: Chain, env: Mapping[Node, Any], apply: Apply) -> Tensor:
    """The value of `chain.out`. The attention is given the keys up to the last query of the tile, which is all that causal attention
    sees, so that its queries are the last of its keys."""
    key_up, value_up = env[chain.key_up], env[chain.value_up]
    kv, indices = (env[node] for node in chain.attention.args[1:3])  # type: ignore[index]
    batch, tokens = indices.shape[:2]
    step = tile_rows(batch, key_up.shape[0], chain.width, key_up.itemsize)
    step = min(step, tokens) if tokens == kv.shape[1] and _is_causal(indices) else tokens
    out: Tensor = key_up.new_empty(0)
    for start in range(0, tokens, step):
        part = range(start, min(start + step, tokens))
        q_nope, q_rope = _queries_of(chain, part, env, apply)
        rows = torch.cat([matmul(q_nope, key_up), q_rope], -1).transpose(1, 2)
        given = rows, kv[:, : part.stop], indices[:, start : part.stop], *chain.attention.args[3:]
        done = matmul(apply(chain.attention, given, {}).transpose(1, 2), value_up)  # [B,H,t,R] -> [B,H,t,dv]
        if step == tokens:
            return done
        out = out if len(out) else done.new_empty(batch, done.shape[1], tokens, done.shape[-1])
        out[:, :, start : part.stop] = done
    return out


def _is_causal(indices: Tensor) -> bool:
    """No query selects a key after its own."""
    return bool((indices.amax(-1) <= torch.arange(indices.shape[1], device=indices.device)).all())


def _queries_of(chain: Chain, part: range, env: Mapping[Node, Any], apply: Apply) -> list[Tensor]:
    """q_nope and q_rope of a tile."""
    own: dict[Node, Any] = {}
    for node, how in chain.queries.items():
        own[node] = run_part(node, how, part, env, own, apply)
    both = (chain.q_nope, chain.q_rope)
    return [own[node] if node in own else env[node][:, :, part.start : part.stop] for node in both]
