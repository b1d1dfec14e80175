"""Linear attention of hybrids: as its recurrence says, token by token, and as transformers computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import close
from torch import Tensor

from mla2dsa.kernels import delta_attention as module

OP = torch.ops.mla2dsa.delta_attention


def given(length: int, dtype: torch.dtype = torch.float32, fast: float = 2.0) -> tuple[Tensor, ...]:
    """query, key, value, decay, beta of two sequences and three heads; decays down to e^-fast a token."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, 3, width, generator=generator) for width in (16, 16, 24))
    decay, beta = -fast * torch.rand(q.shape, generator=generator), torch.rand(2, length, 3, generator=generator)
    return tuple(x.to(dtype) for x in (q, k / 4, v, decay, beta))


def recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, normalise: bool) -> Tensor:
    q, k, v, decay, beta = (x.double() for x in (q, k, v, decay, beta))
    if normalise:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state, outs = q.new_zeros(len(q), *q.shape[2:], v.shape[3]), []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, :, None].exp()
        wrong = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * wrong)
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outs, 1)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 200])
def test_it_is_the_recurrence(length: int, normalise: bool) -> None:
    inputs = given(length)
    close(OP(*inputs, normalise).double(), recurrent(*inputs, normalise), of_max=1e-5)


@pytest.mark.parametrize("fast", [0.0, 1e-3, 20.0])
def test_decays_of_any_size(fast: float) -> None:
    """Logarithms of a whole chunk add up to -1280: nothing overflows."""
    inputs = given(130, fast=fast)
    close(OP(*inputs, True).double(), recurrent(*inputs, True), of_max=1e-5)


@pytest.mark.parametrize("kind", ["kimi_linear", "bailing_hybrid"])
@pytest.mark.parametrize("length", [7, 64, 150])
def test_it_is_transformers(length: int, kind: str) -> None:
    from importlib import import_module

    theirs: Any = import_module(f"transformers.models.{kind}.modeling_{kind}").chunk_kimi_delta_attention
    q, k, v, decay, beta = inputs = given(length)
    expected, state = theirs(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)
    assert state is None
    close(OP(*inputs, True), expected, of_max=1e-5)


def test_the_result_has_the_dtype_of_the_query() -> None:
    inputs = given(70)
    half = OP(*(x.bfloat16() for x in inputs), True)
    assert half.dtype == torch.bfloat16
    close(half.float(), OP(*inputs, True), of_max=0.03)


def test_padded_tokens_in_front_change_nothing() -> None:
    """Their keys, values and betas are zeros."""
    inputs = given(80)
    padded = [torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (5, 0)) for x in inputs]
    close(OP(*padded, True)[:, 5:], OP(*inputs, True), of_max=1e-5)


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_chunks_of_any_size(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = given(130)
    expected = OP(*inputs, True)
    monkeypatch.setattr(module, "CHUNK", chunk)
    close(OP(*inputs, True), expected, of_max=1e-5)


def test_it_is_registered_as_ops_have_to_be() -> None:
    torch.library.opcheck(OP.default, (*given(66), True), test_utils=("test_schema", "test_faketensor"))
