"""Ops that keep a whole module as one node when a model is captured: dense attention and the MoE experts.

Registering is a side effect of the import. Both run the model's own maths; neither is specific to DSA.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .contracts import check_dense_attention, check_moe_experts
from .products import linear

# benchmarks/memory.py --rows: 256 to 2048 take the same time, fewer take longer; at 32K keys a tile's mask has 64 MiB in float32.
QUERY_ROWS = 512  # of dense attention on the CPU at once
HEADS = 16  # at once, as well; fixed by what 32K tokens of V3's width make of their copies: half a GiB

_ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@torch.library.custom_op("mla2dsa::dense_attention", mutates_args=())
def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v: q [B,H,T,d], k [B,H,S,d], v [B,H,S,dv] -> [B,H,T,dv].

    mask: [B|1, H|1, T, S], bool (True attends) or additive in the dtype of q; None is causal and needs T == S.
    A row whose bool mask is all False gives 0. bfloat16, float16, float32, float64.
    Raises ValueError naming the argument whose shape, dtype or device does not fit.
    """
    check_dense_attention(q, k, v, mask)
    if q.device.type == "cpu":
        return _fused(q, k, v, mask, scale)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.contiguous()


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`dense_attention` by torch's flash kernel of the CPU. It takes values as wide as the keys alone: without zeros to fill them up,
    torch would build all scores. A few heads at a time, so that their copies are never as large as all of them.

    Agrees with the unfused formula to the rounding of the dtype. The kernel turns a bool mask into numbers, so that many
    queries at once would need more memory for their mask than for all the rest.
    """
    mask = unless_causal(mask)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))  # [B,H,T,dv]
    for start in range(0, q.shape[1], HEADS):
        heads = slice(start, start + HEADS)
        own = mask if mask is None or mask.shape[1] == 1 else mask[:, heads]
        attend_heads(q[:, heads], k[:, heads], v[:, heads], own, scale, out[:, heads])
    return out


def unless_causal(mask: Tensor | None) -> Tensor | None:
    """The mask, or None where it says no more than that no query sees a later key: then the kernel needs none, and skips those keys."""
    if mask is None or mask.dtype != torch.bool or mask.shape[2] != mask.shape[3]:
        return mask
    keys = torch.arange(mask.shape[3], device=mask.device)
    for seen, own in zip(mask.split(QUERY_ROWS, 2), keys.split(QUERY_ROWS), strict=True):
        if not torch.equal(seen, (keys <= own[:, None]).expand_as(seen)):
            return mask
    return None


def attend_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor) -> None:
    """`dense_attention` of a few heads into `out`, zeros [B,h,T,dv], whose rows without a key stay as they are. mask: bool, or None for
    causal (`unless_causal`)."""
    width, tokens, slots = v.shape[-1], q.shape[2], k.shape[2]
    q, k, v = (_widened(x, max(q.shape[-1], width)) for x in (q, k, v))
    if mask is None:
        out[:] = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :width]
        return
    for start in range(0, tokens, QUERY_ROWS):
        rows = slice(start, start + QUERY_ROWS)
        seen = mask[:, :, rows]
        end = slots if mask.dtype != torch.bool else _end(seen)
        if end:
            given = q[:, :, rows], k[:, :, :end], v[:, :, :end]
            tile = F.scaled_dot_product_attention(*given, attn_mask=seen[..., :end], scale=scale)
            out[:, :, rows] = tile[..., :width]


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))  # pad copies where it adds nothing, too


def _end(mask: Tensor) -> int:
    """One past the last key that any query of the tile may see."""
    seen = mask.flatten(0, 2).any(0).nonzero()
    return int(seen[-1]) + 1 if len(seen) else 0


@dense_attention.register_fake
def _dense_attention_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    check_dense_attention(q, k, v, mask)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op("mla2dsa::moe_experts", mutates_args=())
def moe_experts(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str
) -> Tensor:
    """out[n] = sum_k w[n,k] down_e(act(gate_e(x)) * up_e(x)), with e = top_k_index[n,k]; [N,D] in the dtype of hidden.

    hidden [N,D]; top_k_index [N,k] int32 or int64, an id outside [0, E) adds nothing; top_k_weights [N,k];
    gate_up_proj [E,2I,D], gate rows first; down_proj [E,D,I]. activation: silu, gelu, gelu_pytorch_tanh, relu.
    Raises ValueError naming the argument that does not fit.
    """
    check_moe_experts(hidden, top_k_index, top_k_weights, gate_up_proj, down_proj, activation)
    return run_experts([(hidden, top_k_index, top_k_weights)], gate_up_proj, down_proj, activation)[0]


class Stacked(Protocol):
    """What is read of a weight [E, ...]: its experts, one at a time."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __getitem__(self, expert: int, /) -> Tensor: ...


Tokens: TypeAlias = tuple[Tensor, Tensor, Tensor]  # hidden, top_k_index, top_k_weights


def run_experts(several: Sequence[Tokens], gate_up_proj: Stacked, down_proj: Stacked, activation: str) -> list[Tensor]:
    """`moe_experts` of each of several batches of tokens, whose arguments fit. The weights of an expert are asked for once, and only
    where it serves a token; each result is what it would be alone."""
    act = _ACTIVATION[activation]
    outs = [torch.zeros_like(hidden, memory_format=torch.contiguous_format) for hidden, _, _ in several]
    served = [dict(_slots_by_expert(index, gate_up_proj.shape[0])) for _, index, _ in several]
    for expert in sorted(set().union(*served)):
        gate_up, down = gate_up_proj[expert], down_proj[expert]
        for out, slots_of, (hidden, index, weights) in zip(outs, served, several, strict=True):
            if (slots := slots_of.get(expert)) is None:
                continue
            token = slots // index.shape[1]  # [n]
            gate, up = linear(hidden[token], gate_up).chunk(2, -1)  # [n,I] each
            y = linear(act(gate) * up, down)  # [n,D]
            y = y * weights.flatten()[slots].unsqueeze(-1)
            out.index_add_(0, token, y.to(out.dtype))
    return outs


@moe_experts.register_fake
def _moe_experts_fake(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, activation: str
) -> Tensor:
    check_moe_experts(hidden, top_k_index, top_k_weights, gate_up_proj, down_proj, activation)
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _slots_by_expert(top_k_index: Tensor, experts: int) -> list[tuple[int, Tensor]]:
    """The flat positions of top_k_index that each expert serves, in token order; only experts that serve any."""
    flat = top_k_index.flatten().long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = flat.argsort(stable=True)
    groups = order.split(torch.bincount(flat, minlength=experts + 1).tolist())
    return [(expert, slots) for expert, slots in enumerate(groups[:experts]) if slots.numel()]
