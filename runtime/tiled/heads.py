"""Dense attention of a long sequence, some heads at a time.

What a layer makes of its latents is many times as large as they are:

    q_resid [B,T,r]  -> linear [B,T,H*d]       -> q [B,H,T,d]
    latent  [B,T,R]  -> linear [B,T,H*(dn+dv)] -> k, v [B,H,T,...]   -> dense_attention [B,H,T,dv]

and each head follows from its own rows of the weights. From those linear layers to the attention (`axis.py` says what may be
in between) everything is run for some heads at a time; what others read of it, the attention's result above all, is put together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...compat.aliasing import Memory
from ...kernels import ops  # noqa: F401  registers what is named below
from ...kernels.anchors import unless_causal
from ...passes.graph.graph_eval import linear_parts, nearest_linears, value
from .axis import Apply, Follows, fixed_width, followed, length_of, lies, packed_heads, readers, run_part, undisturbed

_AS_STRIDED = torch.ops.aten.as_strided.default  # what it gives depends on how its argument lies in memory
DENSE = torch.ops.mla2dsa.dense_attention.default
# benchmarks/memory.py --rows: groups of 16 to 512 MiB take the same time, all 64 heads of 4096 tokens at once a little longer.
GROUP_BYTES = 256 * 2**20


@dataclass(frozen=True)
class HeadsApart:
    """how: the nodes that are run for some heads, in their order; out: the attention, at whose place they are; exits: those whose
    values others see; width: channels of one head and one token, in all values together."""

    how: Mapping[Node, Follows]
    out: Node
    exits: tuple[Node, ...]
    heads: int
    width: int

    @property
    def inside(self) -> list[Node]:
        """What is not run by itself."""
        return [node for node in self.how if node is not self.out]

    def run(self, env: Mapping[Node, Any], apply: Apply) -> dict[Node, Any]:
        """Values of `exits`."""
        source = env[_input(next(iter(self.how)))]
        some = heads_at_once(self.heads, source.numel() // source.shape[-1], self.width, source.itemsize)
        env = {**env, **self._mask(env)}
        whole, ends = dict[Node, Tensor](), self._ends()
        for start in range(0, self.heads, some):
            group = range(start, min(start + some, self.heads))
            own: dict[Node, Any] = {}
            for node in self.how:
                own[node] = self._step(node, group, env, own, apply)
                for done in ends[node]:
                    del own[done]
            if len(group) == self.heads:
                return {node: own[node] for node in self.exits}
            for node in self.exits:
                self._put(whole, node, own[node], group)
        return whole

    def _ends(self) -> dict[Node, list[Node]]:
        """What of the nodes is read last by each, and shown to nobody."""
        last = {source: node for node in self.how for source in (node, *node.all_input_nodes) if source in self.how}
        ends: dict[Node, list[Node]] = {node: [] for node in self.how}
        for source, node in last.items():
            if source not in self.exits:
                ends[node].append(source)
        return ends

    def _mask(self, env: Mapping[Node, Any]) -> dict[Node, Any]:
        """The mask, looked at once for all heads, where the attention alone reads it, and each of its heads all of it."""
        mask = (*self.out.args[3:4], None)[0]
        if not isinstance(mask, Node) or mask in self.how[self.out].sliced or mask in self.how:
            return {}
        return {} if (mask.users.keys() & self.how.keys()) - {self.out} else {mask: unless_causal(env[mask])}

    def _step(self, node: Node, group: range, env: Mapping[Node, Any], own: Mapping[Node, Any], apply: Apply) -> Any:
        how = self.how[node]
        if how.packed:
            x, *weights = (None if part is None else env[part] for part in linear_parts(node) or ())
            return apply(
                node, [x, *(None if weight is None else _rows(weight, group, self.heads) for weight in weights)], {}
            )

        return run_part(node, how, group, env, own, apply)

    def _put(self, whole: dict[Node, Tensor], node: Node, part: Tensor, group: range) -> None:
        axis = self.how[node].axis
        if node not in whole:
            shape = [*part.shape[:axis], self.heads * part.shape[axis] // len(group), *part.shape[axis + 1 :]]
            order = lies(node)  # as they would be, where a view looks at them
            whole[node] = part.new_empty([shape[dim] for dim in order]).permute(
                [order.index(dim) for dim in range(len(order))]
            )
        each = whole[node].shape[axis] // self.heads
        whole[node].narrow(axis, group.start * each, len(group) * each).copy_(part)


def _rows(weight: Tensor, group: range, heads: int) -> Tensor:
    each = weight.shape[0] // heads
    return weight[group.start * each : group.stop * each]


def _input(linear: Node) -> Node:
    return (linear_parts(linear) or (linear,))[0]


def heads_at_once(heads: int, tokens: int, width: int, itemsize: int = 4) -> int:
    """tokens: of all sequences."""
    return max(1, min(heads, GROUP_BYTES // max(1, tokens * width * itemsize)))


def heads_apart(nodes: Sequence[Node], memory: Memory, watched: Collection[str] = ()) -> list[HeadsApart]:
    """Of every dense attention among `nodes` (in their order) that can be run so. watched: names of nodes whose values are shown."""
    found = (_apart(node, nodes, memory, watched) for node in nodes if node.target is DENSE)
    return [one for one in found if one is not None]


def _apart(out: Node, nodes: Sequence[Node], memory: Memory, watched: Collection[str]) -> HeadsApart | None:
    if out.kwargs or not all(isinstance(arg, Node) for arg in out.args[:3]):
        return None
    heads, tokens = value(out).shape[1], [length_of(arg, 2) for arg in out.args[:3]]  # type: ignore[arg-type]
    if not isinstance(heads, int) or isinstance(tokens[0], int) or tokens.count(tokens[0]) < 3:
        return None
    how = _followed(out, heads, nodes)
    if how is None:
        return None
    exits = tuple(node for node in how if node is out or node.name in watched or readers(node, how))
    seen = all(isinstance(value(node), Tensor) and _AS_STRIDED not in {u.target for u in node.users} for node in exits)
    width = fixed_width(how)
    if not seen or width is None or not undisturbed(how, exits, out, nodes, memory):
        return None
    return HeadsApart(how, out, exits, heads, width // heads)


def _followed(out: Node, heads: int, nodes: Sequence[Node]) -> dict[Node, Follows] | None:
    """What is run for some heads, in order; None where that cannot be, or the attention's arguments do not have theirs in dim 1."""
    query, key, val, *rest = out.args
    own = set(nodes)
    linears = chain.from_iterable(nearest_linears(arg) for arg in (query, key, val))  # type: ignore[arg-type]
    entries = {node: found for node in linears if node in own and (found := packed_heads(node, heads)) is not None}
    how = followed(entries, nodes, out, heads) if entries else None
    mask = rest[0] if rest and isinstance(rest[0], Node) else None
    by_heads = (query, key, val, *([mask] if mask in (how or ()) else ()))
    if how is None or not all(arg in how and how[arg].axis == 1 and not how[arg].packed for arg in by_heads):
        return None
    sliced = {mask: 1} if mask is not None and mask not in how and length_of(mask, 1) == heads != 1 else {}
    before = {node: one for node, one in how.items() if nodes.index(node) < nodes.index(out)}
    return {**before, out: Follows(1, sliced=sliced), **how}
