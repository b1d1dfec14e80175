"""The ONNX local functions in onnxruntime, against the torch ops they stand for."""

from __future__ import annotations

import pytest
import torch
from comparing import close
from onnx_session import node_model, run_node
from op_samples import causal, randn, ranges, small_ints
from torch import Tensor

from mla2dsa.exporters.onnx_model.functions import _ACTIVATION, BUFFER
from mla2dsa.kernels import ops  # noqa: F401  (registers torch.ops.mla2dsa)

dsa = torch.ops.mla2dsa
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16")]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3}
BUFFERS = [pytest.param(BUFFER, id="one-tile"), pytest.param(700, id="tiles"), pytest.param(1, id="query-by-query")]
# B, T, heads, width, S, K
SHAPES = [(1, 1, 4, 16, 1, 8), (2, 5, 4, 16, 33, 8), (2, 7, 3, 8, 9, 64), (1, 40, 4, 16, 50, 12), (3, 1, 16, 8, 64, 64)]


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_indexer_selects_exactly_the_same_slots(shape: tuple[int, ...], dtype: torch.dtype, buffer: int) -> None:
    """Small integers: many exact ties, negative weights, ragged and empty ranges, ranges that reach beyond the keys."""
    b, t, heads, width, s, k = shape
    inputs = {
        "q": small_ints(b, t, heads, width, dtype=dtype), "k": small_ints(b, s, width, seed=1, dtype=dtype),
        "weights": small_ints(b, t, heads, seed=2, dtype=dtype), "key_begin": (r := ranges(b, t, s))[0], "key_end": r[1],
    }  # fmt: skip
    want = dsa.lightning_indexer(*inputs.values(), k)
    got = run_node("LightningIndexer", inputs, buffer, topk=k)
    assert got.dtype == torch.int32
    assert torch.equal(got, want)


def test_indexer_ranges_may_be_int32() -> None:
    begin, end = causal(2, 4, past=3)
    inputs = {"q": randn(2, 4, 2, 8, dtype=torch.float32), "k": randn(2, 7, 8, seed=1, dtype=torch.float32)}
    inputs |= {"weights": randn(2, 4, 2, seed=2, dtype=torch.float32), "key_begin": begin, "key_end": end}
    got = run_node("LightningIndexer", inputs, topk=3)
    assert torch.equal(got, dsa.lightning_indexer(*inputs.values(), 3))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_indexer_ranks_what_is_not_finite_as_torch_does(bad: float) -> None:
    begin, end = causal(1, 3, past=9)
    k = randn(1, 12, 8, seed=1, dtype=torch.float32)
    k[0, 4] = bad
    inputs = {"q": randn(1, 3, 2, 8, dtype=torch.float32).abs(), "k": k, "weights": -torch.ones(1, 3, 2)}
    inputs |= {"key_begin": begin, "key_end": end}
    got = run_node("LightningIndexer", inputs, topk=11)
    assert torch.equal(got, dsa.lightning_indexer(*inputs.values(), 11))


def selection(b: int, t: int, s: int, k: int) -> Tensor:
    """Any order; -1, slots beyond S, repeated slots, and one row with none."""
    indices = torch.randint(-1, s + 2, (b, t, k), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    indices[0, 0] = -1
    return indices


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_attention_over_the_selected_rows(shape: tuple[int, ...], dtype: torch.dtype, buffer: int) -> None:
    b, t, heads, width, s, k = shape
    inputs = {"q": randn(b, t, heads, width, dtype=dtype), "kv": randn(b, s, width, seed=1, dtype=dtype)}
    inputs["indices"] = selection(b, t, s, k)
    want = dsa.sparse_mla(*inputs.values(), 0.3, width - 2)
    got = run_node("SparseMLA", inputs, buffer, scale=0.3, kv_lora_rank=width - 2)
    assert got.dtype == dtype
    assert not got[0, 0].any()
    close(got, want, rms=TOLERANCE[dtype])


def test_attention_does_not_see_rows_that_were_not_selected() -> None:
    kv = randn(1, 6, 8, seed=1, dtype=torch.float32)
    kv[0, 0] = float("nan")
    inputs = {"q": randn(1, 2, 3, 8, dtype=torch.float32), "kv": kv}
    inputs["indices"] = torch.tensor([[[2, 3, -1, 9], [-1, -1, -1, -1]]], dtype=torch.int32)
    got = run_node("SparseMLA", inputs, scale=1.0, kv_lora_rank=8)
    torch.testing.assert_close(got, dsa.sparse_mla(*inputs.values(), 1.0, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 5, 8), (2, 7, 9, 4), (3, 4, 2, 3)], ids=shape_id)
def test_cache_write(shape: tuple[int, ...], slot_type: torch.dtype, dtype: torch.dtype) -> None:
    """Slots below 0 and beyond the cache are not written; the last sequence has no other."""
    b, t, c, width = shape
    g = torch.Generator().manual_seed(0)
    slots = torch.stack([torch.randperm(c + t + 4, generator=g)[:t] - 3 for _ in range(b)])
    slots[-1] = torch.tensor([-1, c])[torch.arange(t) % 2]
    inputs = {"cache": randn(b, c, width, dtype=dtype), "new": randn(b, t, width, seed=1, dtype=dtype)}
    inputs["slots"] = slots.to(slot_type)
    assert torch.equal(run_node("CacheWrite", inputs), dsa.cache_write(*inputs.values()))


def test_cache_write_takes_a_repeated_last_token() -> None:
    new = randn(1, 4, 3, dtype=torch.float32)
    new[0, 2:] = new[0, 1]
    inputs = {"cache": torch.zeros(1, 5, 3), "new": new, "slots": torch.tensor([[2, 3, 3, 3]])}
    assert torch.equal(run_node("CacheWrite", inputs), dsa.cache_write(*inputs.values()))


def experts(e: int, inner: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stacked as torch has them, and down, gate, up of each in turn with the table of rows."""
    gate_up, down = randn(e, 2 * inner, width, dtype=dtype), randn(e, width, inner, seed=1, dtype=dtype)
    slab = torch.stack([down.reshape(e, inner, width), gate_up[:, :inner], gate_up[:, inner:]], 1)
    first = 3 * torch.arange(e)
    return gate_up, down, slab.reshape(3 * e, inner, width).contiguous(), torch.stack([first + 1, first + 2, first], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 2, 4, 8, 12), (7, 3, 16, 8, 12), (40, 2, 5, 8, 12), (100, 4, 8, 16, 12)], ids=shape_id
)
def test_experts(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """All activations; ids that are no expert add nothing. 40 and 100 tokens give experts more than one block."""
    n, k, e, inner, width = sizes
    gate_up, down, slab, rows = experts(e, inner, width, dtype)
    g = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(e + 2, generator=g)[:k] - 1 for _ in range(n)])
    hidden, weights = randn(n, width, seed=3, dtype=dtype), randn(n, k, seed=4, dtype=dtype)
    inputs = {"hidden": hidden, "top_k_index": chosen, "top_k_weights": weights}
    inputs |= {"gate_proj": slab, "up_proj": slab, "down_proj": slab, "rows": rows}
    for activation in _ACTIVATION:
        want = dsa.moe_experts(hidden, chosen, weights, gate_up, down, activation)
        close(run_node("MoEExperts", inputs, activation=activation), want, rms=TOLERANCE[dtype], name=activation)


def test_experts_of_two_nodes_add_up() -> None:
    gate_up, down, slab, rows = experts(6, 4, 8, torch.float32)
    hidden, weights = randn(9, 8, seed=3, dtype=torch.float32), randn(9, 2, seed=4, dtype=torch.float32)
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(9)])
    shared = {"hidden": hidden, "top_k_index": chosen, "top_k_weights": weights}
    shared |= {"gate_proj": slab, "up_proj": slab, "down_proj": slab}
    mine = (torch.arange(6) % 2 == 0)[:, None]
    halves = [
        run_node("MoEExperts", {**shared, "rows": rows.where(part, -1)}, activation="silu") for part in (mine, ~mine)
    ]
    want = dsa.moe_experts(hidden, chosen, weights, gate_up, down, "silu")
    torch.testing.assert_close(halves[0] + halves[1], want, atol=1e-5, rtol=1e-5)


def test_nobody_routed_here_gives_zero() -> None:
    _, _, slab, rows = experts(4, 4, 8, torch.float32)
    inputs = {"hidden": randn(3, 8, dtype=torch.float32), "top_k_index": torch.full((3, 2), 1)}
    inputs |= {"top_k_weights": torch.ones(3, 2), "gate_proj": slab, "up_proj": slab, "down_proj": slab}
    inputs["rows"] = rows.where(torch.arange(4)[:, None] != 1, -1)
    assert not run_node("MoEExperts", inputs, activation="silu").any()


def test_shape_inference_knows_static_sizes() -> None:
    """The indexer's output width is min(topk, S) wherever S is known."""
    import onnx

    inputs = {"q": torch.zeros(1, 2, 3, 4), "k": torch.zeros(1, 5, 4), "weights": torch.zeros(1, 2, 3)}
    inputs |= {"key_begin": torch.zeros(1, 2, dtype=torch.int64), "key_end": torch.zeros(1, 2, dtype=torch.int64)}
    model = node_model("LightningIndexer", inputs, topk=8)
    for given in model.graph.input:
        for dim, size in zip(given.type.tensor_type.shape.dim, inputs[given.name].shape, strict=True):
            dim.dim_value = size
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model).graph.output[0].type.tensor_type
    assert [dim.dim_value for dim in inferred.shape.dim] == [1, 2, 5]
