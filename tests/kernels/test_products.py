"""Half-precision products on CPUs without instructions for them: as exact as torch's, whatever the shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mla2dsa.kernels import products
from mla2dsa.runtime.execute import PieceRunner

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without such instructions."""
    monkeypatch.setattr(products, "_slow", lambda dtype: dtype in (torch.bfloat16, torch.float16))


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What float32 sums give, rounded once."""
    return exact.to(dtype)


@HALVES
@pytest.mark.parametrize("rows", [1, products.FEW_ROWS, products.FEW_ROWS + 1, products.ROWS + 3])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_is_the_float32_product_rounded(dtype: torch.dtype, rows: int, bias: bool) -> None:
    x, weight = numbers(1, rows, 24, dtype=dtype), numbers(40, 24, dtype=dtype, seed=1)
    added = numbers(40, dtype=dtype, seed=2) if bias else None
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    found = products.linear(x, weight, added)
    assert (found.dtype, found.shape) == (dtype, (1, rows, 40))
    torch.testing.assert_close(found, rounded(exact, dtype))


@HALVES
def test_a_large_weight_is_widened_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PART", 100)
    monkeypatch.setattr(products, "ROWS", 7)
    widened = list[int]()
    real = F.linear

    def seen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        widened.append(weight.numel())
        return real(x, weight, bias)

    monkeypatch.setattr(products.F, "linear", seen)
    x, weight = numbers(20, 24, dtype=dtype), numbers(41, 24, dtype=dtype, seed=1)
    torch.testing.assert_close(products.linear(x, weight), rounded(x.double() @ weight.double().T, dtype))
    assert (max(widened) <= 100, len(widened)) == (True, 3 * 11)


SHAPES = {
    "absorb": ((2, 4, 9, 16), (4, 16, 24)),
    "one head for all": ((2, 4, 9, 16), (1, 16, 24)),
    "matrices": ((9, 16), (16, 24)),
    "one right side": ((2, 3, 9, 16), (16, 24)),
    "one token": ((1, 4, 1, 16), (4, 16, 24)),
    "one left side": ((9, 16), (3, 16, 24)),
    "one of a batch, left": ((1, 9, 16), (3, 16, 24)),
    "one of a batch, right": ((3, 9, 16), (1, 16, 24)),
    "vector": ((9, 16), (16,)),
    "nothing": ((2, 0, 16), (2, 16, 24)),
}


@HALVES
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("part", [1, 1000, products.PART])
def test_matmul_is_the_float32_product_rounded(
    dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "PART", part)
    a, b = (numbers(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    found = products.matmul(a, b)
    torch.testing.assert_close(found, rounded(a.double() @ b.double(), dtype))
    assert found.shape == torch.matmul(a, b).shape


@settings(deadline=None)
@given(
    batch=st.lists(st.sampled_from([1, 3]), min_size=0, max_size=2),
    other=st.lists(st.sampled_from([1, 3]), min_size=0, max_size=2),
    sizes=st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5)),
    turned=st.booleans(),
    part=st.sampled_from([1, 30, products.PART]),
)
def test_shapes_are_torch_s(
    batch: list[int], other: list[int], sizes: tuple[int, int, int], turned: bool, part: int
) -> None:
    rows, inner, columns = sizes
    a = numbers(*batch, rows, inner, dtype=torch.bfloat16)
    b = numbers(*other, *((columns, inner) if turned else (inner, columns)), dtype=torch.bfloat16, seed=1)
    b = b.mT if turned else b
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "PART", part)
        found, exact = products.matmul(a, b), a.double() @ b.double()
    torch.testing.assert_close(found, exact.to(torch.bfloat16))
    assert found.shape == exact.shape


ODD = {
    "weight of one row": (lambda x: products.linear(x, x[0]), lambda x: F.linear(x, x[0])),
    "bias for all": (lambda x: products.linear(x, x, x[0, 0]), lambda x: F.linear(x, x, x[0, 0])),
    "bias of one": (lambda x: products.linear(x, x, x[0, :1]), lambda x: F.linear(x, x, x[0, :1])),
    "other bias": (lambda x: products.linear(x, x, x[:, 0].float()), lambda x: F.linear(x, x, x[:, 0].float())),
    "other widths": (lambda x: products.matmul(x[:, :0], x), lambda x: x[:, :0] @ x),
    "other widths, linear": (lambda x: products.linear(x, x[:, :3]), lambda x: F.linear(x, x[:, :3])),
    "gradients": (lambda x: products.linear(x.requires_grad_(), x), lambda x: F.linear(x, x)),
}


@pytest.mark.parametrize(("ours", "torchs"), ODD.values(), ids=ODD)
def test_what_is_odd_is_left_to_torch(ours: Any, torchs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PART", 1)
    told = list[Any]()
    for call in (ours, torchs):
        try:
            told.append(call(numbers(8, 8, dtype=torch.bfloat16)))
        except RuntimeError as error:
            told.append(str(error))
    assert told[0] == told[1] if isinstance(told[0], str) else torch.equal(*told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_torch_s_own(dtype: torch.dtype) -> None:
    x, weight = numbers(9, 16, dtype=dtype), numbers(24, 16, dtype=dtype, seed=1)
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    assert torch.equal(products.matmul(x, weight.T), x @ weight.T)


def test_where_the_processor_multiplies_them_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_slow", lambda dtype: False)
    x, weight = numbers(9, 16, dtype=torch.bfloat16), numbers(24, 16, dtype=torch.bfloat16, seed=1)
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    assert torch.equal(products.matmul(x, weight.T), x @ weight.T)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(torch.bmm(y, y.mT) @ y)


@pytest.fixture
def runner() -> PieceRunner:
    model = Model().bfloat16().eval()
    return PieceRunner(torch.export.export(model, (numbers(2, 9, 16, dtype=torch.bfloat16),)))


def test_a_graph_s_products_are_served(runner: PieceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product of half-precision matrices of more than a few rows reaches torch."""
    given = list[torch.dtype]()
    linear, matmul = F.linear, torch.matmul

    def seen_linear(x: Tensor, *rest: Tensor) -> Tensor:
        given.append(x.dtype)
        return linear(x, *rest)

    def seen_matmul(a: Tensor, b: Tensor) -> Tensor:
        given.append(a.dtype)
        return matmul(a, b)

    monkeypatch.setattr(F, "linear", seen_linear)
    monkeypatch.setattr(torch, "matmul", seen_matmul)
    (out,) = next(runner.outputs_of([{"x": numbers(2, 9, 16, dtype=torch.bfloat16)}]))
    assert out.dtype == torch.bfloat16
    assert given == [torch.float32] * 2
