"""Sparse attention of a long sequence, a tile of queries at a time.

What `passes/building/absorb.py` puts around `sparse_mla` is several times as large as what goes in and comes out:

    q_nope [B,H,T,dn] -> absorbed [B,H,T,R] -> rows [B,T,H,R+dr] -> attended [B,T,H,R] -> heads [B,H,T,dv]

Every row of it follows from its own query alone, so that between the first and the last no value has to be whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..passes.graph.graph_eval import value

aten = torch.ops.aten
SPARSE_MLA = torch.ops.mla2dsa.sparse_mla.default
# benchmarks/memory.py --rows: 256 to 2048 queries at a time take the same time; at 128 heads of DeepSeek-V3's width 320 have this.
TILE_BYTES = 256 * 2**20
LEAST_ROWS = 64  # fixed by what it costs: 52 MB a sequence at 128 heads


@dataclass(frozen=True)
class Chain:
    """inside: nodes whose values are never whole; out: the one after them, whose value is [B,H,T,dv]."""

    inside: tuple[Node, ...]
    out: Node
    q_nope: Node
    q_rope: Node
    key_up: Node
    attention: Node
    value_up: Node


def chains_in(nodes: Collection[Node], watched: Collection[str] = ()) -> list[Chain]:
    """Those that are all among `nodes`, and of which nobody is shown anything inside. watched: names of nodes."""
    own = set(nodes)
    found = (_chain(node) for node in nodes if node.target is SPARSE_MLA)
    return [
        chain for chain in found
        if chain is not None and own.issuperset((*chain.inside, chain.out)) and not any(n.name in watched for n in chain.inside)
    ]  # fmt: skip


def _chain(attention: Node) -> Chain | None:
    """What `query_rows` and `value_heads` made around it; None where it is not that, or somebody else reads a part."""
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
    if not all(
        isinstance(node, Node) and isinstance(value(node), Tensor) for node in (q_nope, key_up, q_rope, value_up)
    ):
        return None
    return Chain(inside, out, q_nope, q_rope, key_up, attention, value_up)  # type: ignore[arg-type]


def _only_user(node: Node | None, target: Any) -> Node | None:
    user = next(iter(node.users), None) if node is not None and len(node.users) == 1 else None
    return user if user is not None and user.target is target else None


def tile_rows(batch: int, heads: int, latent: int, rope: int, itemsize: int = 4) -> int:
    """Queries at a time."""
    rows = TILE_BYTES // (batch * heads * (3 * latent + rope) * itemsize)
    return max(LEAST_ROWS, rows // LEAST_ROWS * LEAST_ROWS)


def run(chain: Chain, env: Mapping[Node, Any], attend: Callable[..., Tensor]) -> Tensor:
    """The value of `chain.out`. attend: what takes the place of the op: it is given the keys up to the last query of the tile, which
    is all that causal attention sees, so that its queries are the last of its keys."""
    q_nope, q_rope, key_up, value_up = (
        env[node] for node in (chain.q_nope, chain.q_rope, chain.key_up, chain.value_up)
    )
    kv, indices = env[chain.attention.args[1]], env[chain.attention.args[2]]  # type: ignore[index]
    batch, heads, tokens, _ = q_nope.shape
    step = tile_rows(batch, heads, key_up.shape[-1], q_rope.shape[-1], q_nope.itemsize)
    if step >= tokens or tokens != kv.shape[1]:
        return _tile(chain, q_nope, q_rope, key_up, value_up, kv, indices, attend)
    out: Tensor = q_nope.new_empty(batch, heads, tokens, value_up.shape[-1])
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        given = q_nope[:, :, rows], q_rope[:, :, rows], key_up, value_up, kv[:, : rows.stop], indices[:, rows]
        out[:, :, rows] = _tile(chain, *given, attend)
    return out


def _tile(
    chain: Chain, q_nope: Tensor, q_rope: Tensor, key_up: Tensor, value_up: Tensor, kv: Tensor, indices: Tensor,
    attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    rows = torch.cat([q_nope @ key_up, q_rope], -1).transpose(1, 2)
    attended = attend(rows, kv, indices, *chain.attention.args[3:]).transpose(1, 2)  # [B,H,t,R]
    out: Tensor = attended @ value_up
    return out


def inside_of(chains: Iterable[Chain]) -> dict[Node, Node]:
    """The end of the chain that each node is inside of. What such a node is the last to read has to stay until there."""
    return {node: chain.out for chain in chains for node in chain.inside}
