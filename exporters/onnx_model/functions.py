"""The nodes of domain `mla2dsa` as ONNX local functions: what a runtime without our kernels runs in their place.

Written in ONNX's own text form. They compute what `kernels.reference` computes, in float32 inside, on any float type.
The indexer and the attention take queries a tile at a time (a Loop), so that [B,T,HI,S] scores and [B,T,K,R+dr] gathered
rows never exist at once: a tile's buffer stays near BUFFER elements. No shape depends on data, so TensorRT can build
them natively; its limits are TopK's K <= 3840.
"""

from __future__ import annotations

import onnx
from onnx import FunctionProto

from .nodes import DOMAIN, OPSET, attribute_names

BUFFER = 2**22  # elements of the largest buffer in a tile: 16 MiB in float32, what a core can keep close

_CONSTANTS = """
   zero = Constant <value_ints: ints = [0]> ()
   one = Constant <value_ints: ints = [1]> ()
   two = Constant <value_ints: ints = [2]> ()
   minus_one = Constant <value_ints: ints = [-1]> ()
   from = Constant <value_int: int = 0> ()
   step = Constant <value_int: int = 1> ()
"""
_QUERIES = """
   B = Shape <start: int = 0, end: int = 1> (@FIRST)
   T = Shape <start: int = 1, end: int = 2> (@FIRST)
"""
# tile: queries at a time; `tiles` of them cover T, the last one padded. `cost` are the buffer's elements per query.
_TILES = """
   limit = Constant <value_ints: ints = [@BUFFER]> ()
   per_tile = Div (limit, cost)
   positive = Max (per_tile, one)
   tile = Min (positive, T)
   up = Add (T, tile)
   up_1 = Sub (up, one)
   tiles = Div (up_1, tile)
   padded = Mul (tiles, tile)
   pad = Sub (padded, T)
   trips = Squeeze (tiles, zero)
   yes = Constant <value = bool {1}> ()
"""
_LIGHTNING_INDEXER = """(q, k, weights, key_begin, key_end) => (indices) {
   %CONSTANTS%
   %QUERIES%
   H = Shape <start: int = 2, end: int = 3> (q)
   S = Shape <start: int = 1, end: int = 2> (k)
   BH = Mul (B, H)
   cost = Mul (BH, S)
   %TILES%
   dI = Shape <start: int = 3, end: int = 4> (q)
   pads3 = Concat <axis: int = 0> (zero, zero, zero, zero, pad, zero)
   pads4 = Concat <axis: int = 0> (zero, zero, zero, zero, zero, pad, zero, zero)
   pads2 = Concat <axis: int = 0> (zero, zero, zero, pad)
   q_padded = Pad (q, pads4)
   weights_padded = Pad (weights, pads3)
   begin64 = Cast <to: int = 7> (key_begin)
   end64 = Cast <to: int = 7> (key_end)
   begin_padded = Pad (begin64, pads2)
   end_padded = Pad (end64, pads2)
   q_shape = Concat <axis: int = 0> (B, tiles, tile, H, dI)
   w_shape = Concat <axis: int = 0> (B, tiles, tile, H)
   range_shape = Concat <axis: int = 0> (B, tiles, tile, one)
   q_tiled = Reshape (q_padded, q_shape)
   w_tiled = Reshape (weights_padded, w_shape)
   begin_tiled = Reshape (begin_padded, range_shape)
   end_tiled = Reshape (end_padded, range_shape)
   k32 = Cast <to: int = 1> (k)
   k_t = Transpose <perm: ints = [0, 2, 1]> (k32)
   keys = Unsqueeze (k_t, one)
   S0 = Squeeze (S, zero)
   slot = Range (from, S0, step)
   most = Constant <value_int: int = @topk> ()
   most_1 = Reshape (most, one)
   wide = Max (most_1, S)
   lacking = Sub (wide, S)
   lacking_pads = Concat <axis: int = 0> (zero, zero, zero, zero, zero, lacking)
   lowest = Constant <value: tensor = float {-3.4028234663852886e38}> ()
   nothing = Constant <value_float: float = -inf> ()
   rows = Loop (trips, yes) <body: graph = indexer_tile (int64 i, bool go) => (bool more, int32["B","t","K"] row) {
      more = Identity (go)
      q_tile = Gather <axis: int = 1> (q_tiled, i)
      q32 = Cast <to: int = 1> (q_tile)
      dots = MatMul (q32, keys)
      heads = Relu (dots)
      w_tile = Gather <axis: int = 1> (w_tiled, i)
      w32 = Cast <to: int = 1> (w_tile)
      w_row = Unsqueeze (w32, two)
      sums = MatMul (w_row, heads)
      sums3 = Squeeze (sums, two)
      nan = IsNaN (sums3)
      at_least = Max (sums3, lowest)
      finite = Where (nan, lowest, at_least)
      begin_tile = Gather <axis: int = 1> (begin_tiled, i)
      end_tile = Gather <axis: int = 1> (end_tiled, i)
      reached = GreaterOrEqual (slot, begin_tile)
      passed = Less (slot, end_tile)
      visible = And (reached, passed)
      in_range = Where (visible, finite, nothing)
      scores = Pad (in_range, lacking_pads, nothing)
      best, order = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (scores, most_1)
      used = Greater (best, nothing)
      sortable = Where (used, order, S)
      ascending, where = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (sortable, most_1)
      is_slot = Less (ascending, S)
      slots = Where (is_slot, ascending, minus_one)
      row = Cast <to: int = 6> (slots)
   }>
   together = Transpose <perm: ints = [1, 0, 2, 3]> (rows)
   flat_shape = Concat <axis: int = 0> (B, padded, most_1)
   flat = Reshape (together, flat_shape)
   K = Min (most_1, S)
   from_00 = Concat <axis: int = 0> (zero, zero)
   to_TK = Concat <axis: int = 0> (T, K)
   dims_12 = Concat <axis: int = 0> (one, two)
   indices = Slice (flat, from_00, to_TK, dims_12)
}"""

_SPARSE_MLA = """(q, kv, indices) => (out) {
   %CONSTANTS%
   %QUERIES%
   S = Shape <start: int = 1, end: int = 2> (kv)
   D = Shape <start: int = 2, end: int = 3> (kv)
   K = Shape <start: int = 2, end: int = 3> (indices)
   KD = Mul (K, D)
   cost = Mul (B, KD)
   %TILES%
   pads3 = Concat <axis: int = 0> (zero, zero, zero, zero, pad, zero)
   pads4 = Concat <axis: int = 0> (zero, zero, zero, zero, zero, pad, zero, zero)
   q_padded = Pad (q, pads4)
   i64 = Cast <to: int = 7> (indices)
   i_padded = Pad (i64, pads3)
   H = Shape <start: int = 2, end: int = 3> (q)
   q_shape = Concat <axis: int = 0> (B, tiles, tile, H, D)
   i_shape = Concat <axis: int = 0> (B, tiles, tile, K)
   q_tiled = Reshape (q_padded, q_shape)
   i_tiled = Reshape (i_padded, i_shape)
   factor = Constant <value_float: float = @scale> ()
   nothing = Constant <value_float: float = -inf> ()
   none = Constant <value_float: float = 0.0> ()
   rank = Constant <value_int: int = @kv_lora_rank> ()
   rank_1 = Reshape (rank, one)
   outs = Loop (trips, yes) <body: graph = attention_tile (int64 i, bool go) => (bool more, float["B","t","H","R"] o) {
      more = Identity (go)
      i_tile = Gather <axis: int = 1> (i_tiled, i)
      not_low = GreaterOrEqual (i_tile, zero)
      not_high = Less (i_tile, S)
      valid = And (not_low, not_high)
      valid_slots = Where (valid, i_tile, minus_one)
      highest = ReduceMax <keepdims: int = 1> (valid_slots, minus_one)
      some = GreaterOrEqual (highest, zero)
      fallback = Max (highest, zero)
      safe = Where (valid, i_tile, fallback)
      safe4 = Unsqueeze (safe, minus_one)
      picked = GatherND <batch_dims: int = 1> (kv, safe4)
      g = Cast <to: int = 1> (picked)
      q_tile = Gather <axis: int = 1> (q_tiled, i)
      q32 = Cast <to: int = 1> (q_tile)
      q_scaled = Mul (q32, factor)
      q_t = Transpose <perm: ints = [0, 1, 3, 2]> (q_scaled)
      dots_t = MatMul (g, q_t)
      dots = Transpose <perm: ints = [0, 1, 3, 2]> (dots_t)
      valid4 = Unsqueeze (valid, two)
      logits = Where (valid4, dots, nothing)
      p = Softmax <axis: int = -1> (logits)
      wide = MatMul (p, g)
      latent = Slice (wide, zero, rank_1, minus_one)
      some4 = Unsqueeze (some, minus_one)
      o = Where (some4, latent, none)
   }>
   together = Transpose <perm: ints = [1, 0, 2, 3, 4]> (outs)
   flat_shape = Concat <axis: int = 0> (B, padded, H, rank_1)
   flat = Reshape (together, flat_shape)
   out32 = Slice (flat, zero, T, one)
   out = CastLike (out32, q)
}"""

# A slot outside [0, C) must write nothing. Such a token is made to repeat the first token that does write (or, in a
# sequence without one, row 0 as it is): equal rows to one slot, and no copy of the cache.
_CACHE_WRITE = """(cache, new, slots) => (out) {
   %CONSTANTS%
   %QUERIES%
   C = Shape <start: int = 1, end: int = 2> (cache)
   s = Cast <to: int = 7> (slots)
   not_low = GreaterOrEqual (s, zero)
   not_high = Less (s, C)
   inside = And (not_low, not_high)
   inside32 = Cast <to: int = 1> (inside)
   first = ArgMax <axis: int = 1, keepdims: int = 1> (inside32)
   T0 = Squeeze (T, zero)
   B0 = Squeeze (B, zero)
   token = Range (from, T0, step)
   source = Where (inside, token, first)
   source_slot = GatherElements <axis: int = 1> (s, source)
   low_ok = GreaterOrEqual (source_slot, zero)
   high_ok = Less (source_slot, C)
   writes = And (low_ok, high_ok)
   slot = Where (writes, source_slot, zero)
   source3 = Unsqueeze (source, two)
   moved = GatherND <batch_dims: int = 1> (new, source3)
   typed = CastLike (moved, cache)
   row0 = Slice (cache, zero, one, one)
   writes3 = Unsqueeze (writes, two)
   rows = Where (writes3, typed, row0)
   sequence = Range (from, B0, step)
   sequence2 = Unsqueeze (sequence, one)
   BT = Concat <axis: int = 0> (B, T)
   sequence_bt = Expand (sequence2, BT)
   sequence3 = Unsqueeze (sequence_bt, two)
   slot3 = Unsqueeze (slot, two)
   where = Concat <axis: int = 2> (sequence3, slot3)
   out = ScatterND (cache, where, rows)
}"""

# Tokens are put into blocks of one expert each, at most `block` tokens in one: the Loop then reads each expert's weights
# once or a few times, whatever the number of experts, and no shape depends on the routing. `place` is where a token's
# k-th choice went (the spare row of zeros, if to no expert of this node); empty blocks at the end are skipped.
_MOE_EXPERTS = """(hidden, top_k_index, top_k_weights, gate_proj, up_proj, down_proj, rows) => (out) {
   %CONSTANTS%
   sixteen = Constant <value_ints: ints = [16]> ()
   most = Constant <value_ints: ints = [256]> ()
   last_row = Constant <value_ints: ints = [3]> ()
   N = Shape <start: int = 0, end: int = 1> (hidden)
   D = Shape <start: int = 1, end: int = 2> (hidden)
   I = Shape <start: int = 1, end: int = 2> (gate_proj)
   E = Shape <start: int = 0, end: int = 1> (rows)
   k = Shape <start: int = 1, end: int = 2> (top_k_index)
   M = Mul (N, k)
   average = Div (M, E)
   small = Max (average, sixteen)
   medium = Min (small, most)
   block = Min (medium, N)
   groups = Min (E, M)
   extra = Div (M, block)
   blocks = Add (groups, extra)
   E0 = Squeeze (E, zero)
   M0 = Squeeze (M, zero)
   blocks0 = Squeeze (blocks, zero)
   expert = Range (from, E0, step)
   choice = Range (from, M0, step)
   number = Range (from, blocks0, step)
   i64 = Cast <to: int = 7> (top_k_index)
   flat = Reshape (i64, minus_one)
   flat_column = Unsqueeze (flat, one)
   same = Equal (flat_column, expert)
   down_row = Slice (rows, two, last_row, one)
   down_row1 = Squeeze (down_row, one)
   here = GreaterOrEqual (down_row1, zero)
   mine = And (same, here)
   mine32 = Cast <to: int = 6> (mine)
   axis0 = Constant <value_int: int = 0> ()
   running = CumSum (mine32, axis0)
   counts = ReduceSum <keepdims: int = 0> (mine32, zero)
   counts64 = Cast <to: int = 7> (counts)
   up = Add (counts64, block)
   up_1 = Sub (up, one)
   need = Div (up_1, block)
   end = CumSum (need, axis0)
   begin = Sub (end, need)
   row_begin = Mul (begin, block)
   running64 = Cast <to: int = 7> (running)
   rank = Sub (running64, one)
   row_each = Add (row_begin, rank)
   row_mine = Where (mine, row_each, zero)
   row_of = ReduceSum <keepdims: int = 0> (row_mine, one)
   hits = ReduceSum <keepdims: int = 0> (mine32, one)
   zero32 = Cast <to: int = 6> (zero)
   counted = Greater (hits, zero32)
   size = Mul (blocks, block)
   spare = Add (size, one)
   place = Where (counted, row_of, size)
   nobody = Expand (N, spare)
   token = Div (choice, k)
   token_of = ScatterElements <axis: int = 0> (nobody, place, token)
   tokens_flat = Slice (token_of, zero, size, zero)
   blocks_shape = Concat <axis: int = 0> (blocks, block)
   tokens_of = Reshape (tokens_flat, blocks_shape)
   number_column = Unsqueeze (number, one)
   ended = GreaterOrEqual (number_column, end)
   ended64 = Cast <to: int = 7> (ended)
   expert_of = ReduceSum <keepdims: int = 0> (ended64, one)
   pads = Concat <axis: int = 0> (zero, zero, one, zero)
   hidden_padded = Pad (hidden, pads)
   yes = Constant <value = bool {1}> ()
   up_shape = Concat <axis: int = 0> (I, D)
   down_shape = Concat <axis: int = 0> (D, I)
   y_shape = Concat <axis: int = 0> (block, D)
   nothing = ConstantOfShape <value: tensor = float[1] {0.0}> (y_shape)
   ys = Loop (blocks0, yes) <body: graph = expert_block (int64 i, bool go) => (bool more, float["b","D"] y) {
      more = Identity (go)
      i1 = Unsqueeze (i, zero)
      e = Gather <axis: int = 0> (expert_of, i1)
      used0 = Less (e, E)
      used = Squeeze (used0, zero)
      y = If (used) <then_branch: graph = run () => (float["b","D"] y_run) {
         tokens = Gather <axis: int = 0> (tokens_of, i)
         x = Gather <axis: int = 0> (hidden_padded, tokens)
         e_rows = Gather <axis: int = 0> (rows, e)
         e_rows1 = Squeeze (e_rows, zero)
         g_row = Slice (e_rows1, zero, one, zero)
         u_row = Slice (e_rows1, one, two, zero)
         d_row = Slice (e_rows1, two, last_row, zero)
         g3 = Gather <axis: int = 0> (gate_proj, g_row)
         g_flat = Reshape (g3, up_shape)
         g = CastLike (g_flat, hidden)
         gate_x = Gemm <transB: int = 1> (x, g)
         u3 = Gather <axis: int = 0> (up_proj, u_row)
         u_flat = Reshape (u3, up_shape)
         u = CastLike (u_flat, hidden)
         up_x = Gemm <transB: int = 1> (x, u)
         %ACTIVATION%
         inner = Mul (active, up_x)
         d3 = Gather <axis: int = 0> (down_proj, d_row)
         d_flat = Reshape (d3, down_shape)
         d = CastLike (d_flat, hidden)
         y_typed = Gemm <transB: int = 1> (inner, d)
         y_run = Cast <to: int = 1> (y_typed)
      }, else_branch: graph = skip () => (float["b","D"] y_skip) {
         y_skip = Identity (nothing)
      }>
   }>
   y_shape2 = Concat <axis: int = 0> (size, D)
   y_flat = Reshape (ys, y_shape2)
   spare_row = Pad (y_flat, pads)
   chosen = Gather <axis: int = 0> (spare_row, place)
   nkd = Concat <axis: int = 0> (N, k, D)
   chosen3 = Reshape (chosen, nkd)
   w32 = Cast <to: int = 1> (top_k_weights)
   w3 = Unsqueeze (w32, one)
   sums = MatMul (w3, chosen3)
   sums2 = Squeeze (sums, one)
   out = CastLike (sums2, hidden)
}"""
_ACTIVATION = {
    "silu": "sigmoid = Sigmoid (gate_x) active = Mul (gate_x, sigmoid)",
    "gelu": "active = Gelu (gate_x)",
    "gelu_pytorch_tanh": 'active = Gelu <approximate: string = "tanh"> (gate_x)',
    "relu": "active = Relu (gate_x)",
}
_BODIES = {
    "LightningIndexer": _LIGHTNING_INDEXER,
    "SparseMLA": _SPARSE_MLA,
    "CacheWrite": _CACHE_WRITE,
    "MoEExperts": _MOE_EXPERTS,
}


def local_function(name: str, activation: str = "silu", buffer: int = BUFFER) -> FunctionProto:
    """The function for nodes `name`. activation: of MoEExperts (a function cannot branch on a string attribute)."""
    body = _BODIES[name].replace("%CONSTANTS%", _CONSTANTS).replace("%QUERIES%", _QUERIES).replace("%TILES%", _TILES)
    body = body.replace("@FIRST", "new" if name == "CacheWrite" else "q").replace("@BUFFER", str(buffer))
    body = body.replace("%ACTIVATION%", _ACTIVATION[activation])
    attributes = ", ".join(attribute_names(name))
    return onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]> {name} <{attributes}> {body}')
