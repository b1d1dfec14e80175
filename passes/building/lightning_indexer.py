"""The lightning indexer of one site as graph nodes: five parameters, and the selected slots.

    q = rope(wq_b q_resid)      k = rope(LayerNorm(wk hidden))      w = weights_proj hidden * HI^-0.5 dI^-0.5
    indices = top-k over s of  sum_h w_h ReLU(q_h . k_s)            (DeepSeek-V3.2 technical report, eq. 1)

The rotary table is the model's own, reached from k_pe; rotary channels come first in a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from ...errors import UserError
from ...kernels import ops  # noqa: F401  (registers torch.ops.mla2dsa)
from ...kernels.spec import K_NORM_EPS, IndexerConfig, IndexerWeights
from ..graph.editor import GraphBuilder
from ..graph.graph_eval import value
from ..matching.rope import head_axis
from ..matching.sites import MlaSite

aten = torch.ops.aten


def select(
    build: GraphBuilder,
    site: MlaSite,
    config: IndexerConfig,
    weights: IndexerWeights | None,
    key_range: tuple[Node, Node],
    shared: dict[object, Node],
) -> Node:
    """[B, T, min(index_topk, S)] int32 slots. `shared` holds what all layers share (the rotary table)."""
    param = _parameters(build, site, config, weights)
    batch, tokens = build.size(site.hidden, 0), build.size(site.hidden, 1)
    heads, width = config.index_n_heads, config.index_head_dim
    query = build(aten.linear.default, site.q_input, param["wq_b.weight"])
    query = build(aten.view.default, query, [batch, tokens, heads, width])
    key = build(aten.linear.default, site.hidden, param["wk.weight"])
    key = build(aten.layer_norm.default, key, [width], param["k_norm.weight"], param["k_norm.bias"], K_NORM_EPS)
    table = rotary_table(build, site, shared)
    if table is not None:
        cos, sin = table
        per_head = (build(aten.unsqueeze.default, cos, -2), build(aten.unsqueeze.default, sin, -2))
        query, key = _rotate(build, query, *per_head, config), _rotate(build, key, cos, sin, config)
    weight = _head_weights(build, site, param["weights_proj.weight"], config)
    return build(torch.ops.mla2dsa.lightning_indexer.default, query, key, weight, *key_range, config.index_topk)


def _parameters(
    build: GraphBuilder, site: MlaSite, config: IndexerConfig, weights: IndexerWeights | None
) -> dict[str, Node]:
    like = value(site.hidden)
    given: Mapping[str, Tensor] = weights.tensors() if weights is not None else {}
    nodes = {}
    for name, shape in IndexerWeights.shapes(config, site.dims.hidden_size, site.dims.q_width).items():
        dtype = _head_weight_dtype(like.dtype) if name == "weights_proj.weight" else like.dtype
        tensor = given[name].to(like.device, dtype) if given else torch.empty(shape, dtype=dtype, device="meta")
        if tuple(tensor.shape) != shape:
            raise UserError(f"{site.name}.indexer.{name} is {list(tensor.shape)}, expected {list(shape)}")
        nodes[name] = build.editor.add_parameter(f"{site.name}.indexer.{name}", tensor)
    return nodes


def _head_weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """weights_proj is never computed in half precision (DeepSeek's fix of 2025-11-17)."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _head_weights(build: GraphBuilder, site: MlaSite, weights_proj: Node, config: IndexerConfig) -> Node:
    hidden, dtype = site.hidden, value(weights_proj).dtype
    if value(hidden).dtype != dtype:
        hidden = build(aten.to.dtype, hidden, dtype)
    factor = config.index_n_heads**-0.5 * config.index_head_dim**-0.5
    return build(aten.mul.Tensor, build(aten.linear.default, hidden, weights_proj), factor)


def rotary_table(build: GraphBuilder, site: MlaSite, shared: dict[object, Node]) -> tuple[Node, Node] | None:
    """(cos, sin), [B|1, T, qk_rope_head_dim / 2], column i turning pair i; None for NoPE."""
    rope = site.rope
    if rope is None:
        return None
    if ("cos", rope.cos, rope.table) not in shared:
        cos, sin = rope.cos, rope.sin
        if rope.complex_table:
            parts = build(aten.view_as_real.default, cos)
            cos, sin = build(aten.select.int, parts, -1, 0), build(aten.select.int, parts, -1, 1)
        for name, node in (("cos", cos), ("sin", sin)):
            shared[name, rope.cos, rope.table] = _columns(build, node, rope.table, site)
    return shared["cos", rope.cos, rope.table], shared["sin", rope.cos, rope.table]


def _columns(build: GraphBuilder, table: Node, columns: tuple[int, ...], site: MlaSite) -> Node:
    dtype = value(site.hidden).dtype
    start, width = columns[0], len(columns)
    step = columns[1] - columns[0] if width > 1 else 1
    if step < 1 or columns != tuple(range(start, start + step * width, step)):
        raise UserError(f"{site.name}: its rotary table's columns {list(columns)} are not evenly spaced: not supported")
    if (start, step, width) != (0, 1, value(table).shape[-1]):
        table = build(aten.slice.Tensor, table, -1, start, start + step * (width - 1) + 1, step)
    axis = head_axis(table)
    if axis:
        table = build(aten.squeeze.dim, table, axis)
    return table if value(table).dtype == dtype else build(aten.to.dtype, table, dtype)


def _rotate(build: GraphBuilder, x: Node, cos: Node, sin: Node, config: IndexerConfig) -> Node:
    """Channels i and i + half turn together, or 2i and 2i + 1; the result is half-split either way, as scores need it."""
    width, half = config.index_head_dim, int(value(cos).shape[-1])
    if width < 2 * half:
        raise UserError(f"index_head_dim is {width}, expected at least the {2 * half} rotary channels of this model")
    step, second_at = (2, 1) if config.rope_interleave else (1, half)
    first = build(aten.slice.Tensor, x, -1, 0, 2 * half - second_at, step)
    second = build(aten.slice.Tensor, x, -1, second_at, 2 * half, step)
    turned_first = build(aten.sub.Tensor, build(aten.mul.Tensor, first, cos), build(aten.mul.Tensor, second, sin))
    turned_second = build(aten.add.Tensor, build(aten.mul.Tensor, second, cos), build(aten.mul.Tensor, first, sin))
    parts = [turned_first, turned_second]
    if 2 * half < width:
        parts.append(build(aten.slice.Tensor, x, -1, 2 * half, width))
    return build(aten.cat.default, parts, -1)
