"""Linear attention by the gated delta rule with a decay for each channel (Kimi Delta Attention, arXiv 2510.26692), as one op.

Hybrids have it between their MLA layers, which is all that a conversion looks at: in a graph it is one node, so that the loop over
chunks, which torch.export would unroll for the length it saw, stays out of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64  # tokens whose pairs are looked at at once: [B, H, CHUNK, CHUNK, K] float32 is 67 MB for 32 heads of 128


@torch.library.custom_op("mla2dsa::delta_attention", mutates_args=())
def delta_attention(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, normalise: bool) -> Tensor:
    """[B, T, H, V] in the dtype of query: o_t = S_t^T q_t with S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T.

    query, key, decay: [B, T, H, K]; value: [B, T, H, V]; beta: [B, T, H]. decay: g, logarithms of what every channel of the state keeps.
    normalise: queries and keys are brought to length 1 first. Queries are scaled by K^-0.5. In float32, a chunk at a time: within it,
    what later keys see of earlier ones is a unit triangular system (the paper's section 3).
    """
    q, k, v, g = (x.transpose(1, 2).float() for x in (query, key, value, decay))
    b = beta.transpose(1, 2).float()[..., None]
    if normalise:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outs = []
    for start in range(0, q.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        out, state = _chunk(q[:, :, part], k[:, :, part], v[:, :, part], g[:, :, part], b[:, :, part], state)
        outs.append(out)
    return torch.cat(outs, 2).transpose(1, 2).contiguous().to(query.dtype)


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Of [B, H, C, ...] and the state before: the output, and the state behind."""
    since = g.cumsum(2)  # what is left of a key from before the chunk
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    left = (since[..., :, None, :] - since[..., None, :, :]).masked_fill_(later[..., None], -torch.inf).exp_()
    scores = torch.einsum("bhik,bhjk,bhijk->bhij", q, k, left)
    overlap = torch.einsum("bhik,bhjk,bhijk->bhij", beta * k, k, left).tril(-1)
    right = torch.cat([beta * v, beta * k * since.exp()], -1)
    solved = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
    new = solved[..., : v.shape[-1]] - solved[..., v.shape[-1] :] @ state
    out = (q * since.exp()) @ state + scores @ new
    last = since[:, :, -1:]
    return out, state * last.exp().mT + (k * (last - since).exp()).mT @ new


@delta_attention.register_fake
def _delta_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, normalise: bool
) -> Tensor:
    return query.new_empty(value.shape)
