"""Sparse attention of a prefill in a program with caches: in absorbed or in per-head form, whichever is less work.

The same softmax over the same keys, its products in another order (DeepSeek-V2 paper, section 2.1):

    absorbed: (q W_UK) . latent, R + dr channels a pair and R for its value, over the selected keys alone: `sparse_mla`
    per head: q . (latent W_UK^T), dn + dr channels and dv, over every key up to the last; what is not selected is masked out

The second is a third of the work of a pair, so that it wins until there are about twice index_topk keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...compat.aliasing import Memory
from ...kernels import native_ops
from ...kernels.anchors import HEADS, QUERY_ROWS, attend_heads
from ...kernels.choice import KERNELS_ENV
from ...kernels.products import linear, matmul
from .axis import Apply
from .queries import Chain, cached_chains_in, tile_rows

LEAST = 64  # queries: fixed by what fewer of them could gain, less than the look at their indices takes
ABSORBED_ROWS = 512  # queries at once: fixed by memory, 53 MB at DeepSeek-V2-Lite's 16 heads, which 2048 would take from the system anew
# Products a second, those of torch's flash kernel being 1. benchmarks/cpu_ops.py, prefill at 2K, on Zen 3 and Zen 4.
_SPARSE = {native_ops.TORCH: 0.8, "portable": 0.5}
_SPARSE_HALF = {"avx512_bf16": 2.8}
_USUAL = 1.5
_GEMM = 2.0


@dataclass(frozen=True)
class Either:
    """A chain of a program with caches, run in either form."""

    chain: Chain

    @property
    def inside(self) -> list[Node]:
        return self.chain.inside

    @property
    def out(self) -> Node:
        return self.chain.out

    @property
    def exits(self) -> tuple[Node]:
        return self.chain.exits

    def run(self, env: Mapping[Node, Any], apply: Apply) -> dict[Node, Any]:
        """As a `Part` does."""
        chain = self.chain
        q_nope, q_rope, up, down = (env[node] for node in (chain.q_nope, chain.q_rope, chain.key_up, chain.value_up))
        given: list[Any] = [env[x] if isinstance(x, Node) else x for x in chain.attention.args[1:]]
        kv, indices, scale, rank = given

        def sparse_mla(rows: Tensor, selected: Tensor) -> Tensor:
            done: Tensor = apply(chain.attention, (rows, kv, selected, scale, rank), {})
            return done

        step = min(ABSORBED_ROWS, tile_rows(len(kv), len(up), chain.width, up.itemsize))
        return {chain.out: in_less_work(q_nope, q_rope, kv, indices, up, down, scale, sparse_mla, step)}


def either_in(nodes: Sequence[Node], memory: Memory, watched: Collection[str] = ()) -> list[Either]:
    """As `chains_in`."""
    return [Either(chain) for chain in cached_chains_in(nodes, memory, watched)]


def in_less_work(
    q_nope: Tensor, q_rope: Tensor, kv: Tensor, indices: Tensor, key_up: Tensor, value_up: Tensor, scale: float,
    sparse_mla: Callable[[Tensor, Tensor], Tensor], step: int = ABSORBED_ROWS,
) -> Tensor:  # fmt: skip
    """`attend`, or the same in absorbed form, `step` queries at a time. sparse_mla: the op, of query rows and their indices."""
    if pays(q_nope, kv, indices, key_up, value_up):
        return attend(q_nope, q_rope, kv, indices, key_up, value_up, scale)

    def absorbed(part: slice) -> Tensor:
        rows = torch.cat([matmul(q_nope[:, :, part], key_up), q_rope[:, :, part]], -1).transpose(1, 2)
        return matmul(sparse_mla(rows, indices[:, part]).transpose(1, 2), value_up)  # [B,H,t,dv]

    done = [absorbed(slice(start, start + step)) for start in range(0, max(1, q_nope.shape[2]), step)]
    return done[0] if len(done) == 1 else torch.cat(done, 2)


def pays(q_nope: Tensor, kv: Tensor, indices: Tensor, key_up: Tensor, value_up: Tensor) -> bool:
    """Whether the per-head form is less work here. Arguments as for `attend`."""
    tokens, (_, nope, rank) = q_nope.shape[2], key_up.shape
    if (
        tokens < LEAST or q_nope.device.type != "cpu" or os.environ.get(KERNELS_ENV)
    ):  # whoever names the kernels is to have them
        return False
    rope, wide = kv.shape[2] - rank, nope + value_up.shape[2]
    keys, pairs = int(indices.max()) + 1, int((indices >= 0).sum()) // len(indices)
    path = native_ops.taken(q_nope.dtype)
    speed = (_SPARSE_HALF if q_nope.dtype == torch.bfloat16 else _SPARSE).get(path, _SPARSE.get(path, _USUAL))
    absorbed = pairs * (2 * rank + rope) / speed + tokens * rank * wide / _GEMM
    seen = tokens * (keys - (tokens - min(tokens, QUERY_ROWS)) / 2)  # no later keys than the last of a tile of queries
    less = seen * 2 * max(nope + rope, value_up.shape[2]) + keys * rank * wide / _GEMM < absorbed
    return less and bool(kv[:, :keys].isfinite().all())  # what is masked out would be NaN in every sum


def attend(
    q_nope: Tensor, q_rope: Tensor, kv: Tensor, indices: Tensor, key_up: Tensor, value_up: Tensor, scale: float
) -> Tensor:
    """[B,H,T,dv] of q_nope [B,H,T,dn], q_rope [B,H,T,dr], kv [B,S,R+dr], indices [B,T,K], key_up [H,dn,R], value_up [H,R,dv].

    indices: as `lightning_indexer` gives them, none twice. A few heads' keys and values are there at a time.
    """
    end, rank = max(1, int(indices.max()) + 1), key_up.shape[2]
    latent, k_rope = kv[:, :end, :rank], kv[:, None, :end, rank:]
    selected = None if _every_key(indices, end) else _selected(indices, end)
    out = q_nope.new_zeros(*q_nope.shape[:3], value_up.shape[2])
    for start in range(0, len(key_up), HEADS):
        some = slice(start, start + HEADS)
        keys = _per_head(latent, key_up[some])
        keys = torch.cat([keys, k_rope.expand(-1, keys.shape[1], -1, -1)], -1)
        queries = torch.cat([q_nope[:, some], q_rope[:, some]], -1)
        attend_heads(queries, keys, _per_head(latent, value_up[some].mT), selected, scale, out[:, some])
    return out


def _per_head(latent: Tensor, up: Tensor) -> Tensor:
    """[B,h,S,d] of latents [B,S,R] by up [h,d,R], as one product."""
    made = linear(latent, up.reshape(-1, up.shape[2]))
    return made.view(*latent.shape[:2], *up.shape[:2]).transpose(1, 2)


def _every_key(indices: Tensor, end: int) -> bool:
    """Whether every query selects itself and all before it, from the first on, which the kernel knows without a mask."""
    if indices.shape[1] != end:
        return False
    own = torch.arange(end, device=indices.device)
    return bool(((indices >= 0).sum(-1) == own + 1).all() and (indices.amax(-1) == own).all())


def _selected(indices: Tensor, end: int) -> Tensor:
    """Bool [B,1,T,end]."""
    found = torch.zeros(*indices.shape[:2], end + 1, dtype=torch.bool, device=indices.device)
    found.scatter_(2, indices.long().masked_fill(indices < 0, end), True)
    return found[:, None, :, :end]
