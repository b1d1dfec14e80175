"""The capture anchors against the formulas they stand for."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from comparing import close
from op_samples import FLOAT_TOLERANCE, randn

from mla2dsa.kernels import anchors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
def test_dense_attention(kind: str, dtype: torch.dtype) -> None:
    q, k, v = (randn(2, 3, 6, width, seed=width, dtype=dtype) for width in (8, 8, 5))
    k = randn(2, 3, 6, 8, seed=9, dtype=dtype)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    if kind != "causal":
        allowed[1, :, 4, 0] = False
    additive = torch.zeros(2, 1, 6, 6, dtype=dtype).masked_fill(~allowed, -torch.inf)
    mask = {"causal": None, "bool": allowed, "additive": additive}[kind]
    want = (q @ k.mT * 0.4 + additive).softmax(-1) @ v
    close(anchors.dense_attention(q, k, v, mask, 0.4), want, rms=FLOAT_TOLERANCE[dtype])


def test_dense_attention_row_without_keys_is_zero() -> None:
    q, v = randn(1, 2, 3, 8), randn(1, 2, 3, 8, seed=1)
    mask = torch.tensor([[True, False, False], [False] * 3, [True] * 3]).view(1, 1, 3, 3)
    out = anchors.dense_attention(q, q, v, mask, 0.3)
    assert out[:, :, 1].abs().max() == 0
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_moe_experts(activation: str) -> None:
    hidden, gate_up, down, weights = randn(9, 6), randn(3, 8, 6, seed=1), randn(3, 6, 4, seed=2), randn(9, 2, seed=3)
    index = torch.randint(-1, 5, (9, 2), generator=torch.Generator().manual_seed(4))  # ids -1, 3 and 4 name no expert
    act = {
        "silu": lambda x: x * x.sigmoid(),
        "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_pytorch_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": lambda x: x.clamp(min=0),
    }[activation]
    want = torch.zeros_like(hidden)
    for n, j in torch.cartesian_prod(torch.arange(9), torch.arange(2)).tolist():
        if 0 <= (e := int(index[n, j])) < 3:
            want[n] += weights[n, j] * (down[e] @ (act(gate_up[e, :4] @ hidden[n]) * (gate_up[e, 4:] @ hidden[n])))
    got = anchors.moe_experts(hidden, index, weights, gate_up, down, activation)
    close(got, want, rms=1e-12)
    close(
        anchors.moe_experts(
            *(x.float() if x.is_floating_point() else x for x in (hidden, index, weights, gate_up, down)),
            activation,
        ),
        want,
        rms=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(24, 16), (16, 16), (8, 12)], ids=["narrow values", "equal", "wide values"])
@pytest.mark.parametrize("padded", [0, 3, 40], ids="{} padded".format)
def test_tiles_of_queries_are_the_whole_attention(
    padded: int, widths: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the rounding of the dtype; 40 padded keys leave whole tiles of queries with nothing to see."""
    monkeypatch.setattr(anchors, "QUERY_ROWS", 16)
    q, k, v = (randn(2, 3, 50, width, seed=i, dtype=dtype) for i, width in enumerate((widths[0], *widths)))
    mask = torch.ones(50, 50, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[0, ..., :padded] = False
    logits = (q.double() @ k.double().mT * 0.4).masked_fill(~mask, -torch.inf)
    want = logits.softmax(-1).nan_to_num() @ v.double()
    got = anchors.dense_attention(q, k, v, mask, 0.4)
    assert got.dtype == dtype
    assert got.is_contiguous()
    close(got, want.to(dtype), rms=FLOAT_TOLERANCE[dtype])


def test_no_score_matrix_is_built() -> None:
    """In float32 the scores alone would be 1 GiB, of a V3 layer with 16 heads at 4096 tokens."""
    script = """
import resource, torch
from mla2dsa.kernels import anchors
q, k, v = (torch.randn(1, 16, 4096, width) for width in (192, 192, 128))
mask = torch.ones(4096, 4096, dtype=torch.bool).tril()[None, None]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
anchors.dense_attention(q, k, v, mask, 0.1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300


@pytest.mark.parametrize("change", [None, "pad", "later", "own", "float", "wide"])
def test_a_mask_is_left_out_where_it_is_causality_alone(change: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "QUERY_ROWS", 4)
    mask: Any = torch.ones(11, 11, dtype=torch.bool).tril().expand(2, 1, 11, 11).clone()
    if change == "pad":
        mask[1, 0, :, 0] = False
    elif change == "later":
        mask[0, 0, 9, 10] = True
    elif change == "own":
        mask[1, 0, 10, 10] = False
    elif change == "float":
        mask = torch.zeros(2, 1, 11, 11).masked_fill(~mask, -torch.inf)
    elif change == "wide":
        mask = torch.cat([mask, mask[..., :1]], -1)
    left = anchors.unless_causal(mask)
    assert left is (None if change is None else mask)
    if change != "wide":
        q, k, v = (torch.randn(2, 3, 11, 8) for _ in range(3))
        found = torch.ops.mla2dsa.dense_attention(q, k, v, mask, 0.3)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(found, expected.nan_to_num(), rtol=1e-5, atol=1e-6)
