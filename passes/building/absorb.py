"""The absorbed (MQA) form of an MLA site, as graph nodes: one key row per token, one query row per head.

    query row [H] = [ W_UK[h]^T q_nope[h] | q_rope[h] ]      key row = [ latent | k_pe ]      value = latent
    (DeepSeek-V2 paper, section 2.1; DeepSeek-V3.2 attends in this form)

W_UK and W_UV are views of the kv_b weight, so nothing is copied and the state dict keeps its names.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.editor import GraphBuilder
from ..graph.graph_eval import value
from ..matching.sites import MlaSite

aten = torch.ops.aten


def key_rows(build: GraphBuilder, site: MlaSite) -> Node:
    """[B, S, kv_lora_rank + qk_rope_head_dim]"""
    dims = site.dims
    batch, tokens = build.size(site.hidden, 0), build.size(site.hidden, 1)
    latent = build(aten.reshape.default, site.latent, [batch, tokens, dims.kv_lora_rank])
    k_pe = build(aten.reshape.default, site.k_pe, [batch, tokens, dims.qk_rope_head_dim])
    return build(aten.cat.default, [latent, k_pe], -1)


def query_rows(build: GraphBuilder, site: MlaSite, query: Node) -> Node:
    """[B, T, H, kv_lora_rank + qk_rope_head_dim] from `query` [B, H, T, qk_head_dim]."""
    dims = site.dims
    nope, rope = dims.qk_nope_head_dim, dims.qk_rope_head_dim
    nope_at, rope_at = (rope, 0) if site.rope_first else (0, nope)
    q_nope = build(aten.slice.Tensor, query, -1, nope_at, nope_at + nope)
    q_rope = build(aten.slice.Tensor, query, -1, rope_at, rope_at + rope)
    absorbed = build(aten.matmul.default, q_nope, key_up(build, site))  # [B, H, T, kv_lora_rank]
    return build(aten.transpose.int, build(aten.cat.default, [absorbed, q_rope], -1), 1, 2)


def value_heads(build: GraphBuilder, site: MlaSite, attended: Node) -> Node:
    """[B, H, T, v_head_dim] from `attended` [B, T, H, kv_lora_rank]."""
    up = build(aten.transpose.int, value_up(build, site), 1, 2)  # [H, kv_lora_rank, v_head_dim]
    return build(aten.matmul.default, build(aten.transpose.int, attended, 1, 2), up)


def key_up(build: GraphBuilder, site: MlaSite) -> Node:
    """W_UK [H, qk_nope_head_dim, kv_lora_rank]"""
    return _rows_of(build, site, site.uk_rows, "uk_rows")


def value_up(build: GraphBuilder, site: MlaSite) -> Node:
    """W_UV [H, v_head_dim, kv_lora_rank]"""
    return _rows_of(build, site, site.uv_rows, "uv_rows")


def _rows_of(build: GraphBuilder, site: MlaSite, rows: Tensor, name: str) -> Node:
    heads, width = rows.shape
    weight = site.kv_b_weight
    per_head, rest = divmod(value(weight).shape[0], heads)
    first = int(rows[0, 0])
    regular = torch.arange(heads)[:, None] * per_head + first + torch.arange(width)
    if not rest and first + width <= per_head and torch.equal(rows, regular):
        # [head][nope | v], as every released checkpoint stores it: a view
        blocks = build(aten.view.default, weight, [heads, per_head, site.dims.kv_lora_rank])
        return build(aten.slice.Tensor, blocks, 1, first, first + width)
    device = value(weight).device  # a graph captured on meta still needs the real row numbers
    index = build.editor.add_constant(
        f"{site.name}.{name}", rows.flatten().to("cpu" if device.type == "meta" else device)
    )
    picked = build(aten.index_select.default, weight, 0, index)
    return build(aten.view.default, picked, [heads, width, site.dims.kv_lora_rank])


def key_range(build: GraphBuilder, site: MlaSite) -> tuple[Node, Node]:
    """(key_begin, key_end), [B, T] int64: the half-open range of slots each query may see.

    Causal: key_end is the query's slot plus one. Padding on the left moves key_begin to the first real token; padding on
    the right needs nothing, since no real query sees past itself. What a padded query gets is unspecified (an empty
    range gives 0).
    """
    batch, tokens = build.size(site.hidden, 0), build.size(site.hidden, 1)
    device = value(site.hidden).device
    end = build(aten.arange.start, 1, _plus_one(build, tokens), dtype=torch.int64, device=device)
    end = build(aten.expand.default, build(aten.unsqueeze.default, end, 0), [batch, tokens])
    if site.padding is None:
        begin = build(aten.full.default, [batch, tokens], 0, dtype=torch.int64, device=device)
        return begin, end
    real = build(aten.ne.Scalar, site.padding, 0)
    first = build(aten.argmax.default, build(aten.to.dtype, real, torch.int64), 1, True)  # ties: the first one
    return build(aten.expand.default, first, [batch, tokens]), end


def _plus_one(build: GraphBuilder, size: Node | int) -> Node | int:
    return size + 1 if isinstance(size, int) else build(operator.add, size, 1)
