"""Programs around an attention that a part at a time must not change: writes, views, other dims, other readers.

Each was found by an attack, where it gave wrong numbers or crashed. What matters is the same result; whether it is run in parts
stands beside, so that a case that stops being one is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import close
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mla2dsa.runtime.execute import PieceRunner
from mla2dsa.runtime.footprint import Footprints
from mla2dsa.runtime.tiled import heads, queries

aten = torch.ops.aten
BATCH, TOKENS, HEADS, NOPE, ROPE, LATENT, HIDDEN, KEYS = 2, 11, 4, 8, 4, 6, 16, 5
WIDTH = NOPE + ROPE


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "heads_at_once", lambda *_: 1)
    monkeypatch.setattr(queries, "tile_rows", lambda *_: 5)  # a last tile of one query


class Model(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.q, self.kv, self.fused = (
            nn.Linear(HIDDEN, HEADS * WIDTH),
            nn.Linear(HIDDEN, LATENT + ROPE),
            nn.Linear(HIDDEN, 58),
        )
        self.k, self.square = nn.Linear(HIDDEN, HEADS * 2 * WIDTH), nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.key_up, self.value_up = (nn.Parameter(torch.randn(HEADS, *s)) for s in ((NOPE, LATENT), (LATENT, 5)))
        self.own = nn.Parameter(torch.randn(HEADS, WIDTH))

    def forward(self, x: Tensor, indices: Tensor) -> Any:
        return self.run(self, x * 1.0, indices.clone())

    def queries(self, x: Tensor) -> Tensor:
        return self.q(x).view(x.shape[0], x.shape[1], HEADS, WIDTH).transpose(1, 2)

    def dense(self, x: Tensor, q: Tensor | None = None, mask: Tensor | None = None) -> Any:
        k, v = self.k(x).view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2).split([WIDTH, WIDTH], -1)
        return torch.ops.mla2dsa.dense_attention(self.queries(x) if q is None else q, k, v, mask, 0.3)

    def sparse(self, nope: Tensor, rope: Tensor, kv: Tensor, indices: Tensor) -> Any:
        rows = torch.cat([nope @ self.key_up, rope], -1).transpose(1, 2)
        return torch.ops.mla2dsa.sparse_mla(rows, kv, indices, 0.3, LATENT)


def exported(run: Callable[..., Any], batch: int = BATCH) -> tuple[ExportedProgram, dict[str, Tensor]]:
    torch.manual_seed(1)
    indices = torch.arange(TOKENS)[:, None] - torch.arange(KEYS)
    given = {
        "x": torch.randn(batch, TOKENS, HIDDEN),
        "indices": indices.where(indices >= 0, -1).int().expand(batch, -1, -1).contiguous(),
    }
    tokens = Dim("tokens", min=3, max=64)
    shapes = {"x": {1: tokens}, "indices": {1: tokens}}
    return torch.export.export(Model(run).requires_grad_(False), tuple(given.values()), dynamic_shapes=shapes), given


def same_in_parts(run: Callable[..., Any], batch: int = BATCH) -> int:
    """How many parts there are. The result is what it is whole."""
    program, given = exported(run, batch)
    cores = [node.name for node in program.graph.nodes if node.target in (heads.DENSE, queries.SPARSE_MLA)]
    whole, apart = PieceRunner(program, None, cores), PieceRunner(program, None, cores)
    whole._tiled = False
    for expected, found in zip(next(whole.outputs_of([given])), next(apart.outputs_of([given])), strict=True):
        assert found.shape == expected.shape
        close(found, expected, rtol=1e-4, atol=1e-4)
    return sum(len(apart.parts(piece, ())) for piece in apart.pieces)


def filled_after(m: Model, x: Tensor, indices: Tensor) -> Any:
    q = m.queries(x)
    out = m.dense(x, q)
    early = (q * 2).sum(1).exp()
    q[..., :4].copy_(q[..., 4:8])
    return out, early


def read_later_written_between(m: Model, x: Tensor, indices: Tensor) -> Any:
    q, z = m.queries(x), x.sin()
    seen = z[:, None, :, :WIDTH]
    out = m.dense(x, q)
    z.mul_(3.0)
    return out, (q * seen).exp()


def written_through_a_view(m: Model, x: Tensor, indices: Tensor) -> Any:
    q0 = m.q(x).view(x.shape[0], x.shape[1], HEADS, WIDTH)
    q = q0.transpose(1, 2)
    out = m.dense(x, q)
    q0.select(0, 0).mul_(0.5)
    return out, q.exp()


def contiguous_written(m: Model, x: Tensor, indices: Tensor) -> Any:
    q = m.queries(x)
    copy = q.contiguous()
    copy[..., :4].copy_(q[..., 4:8] * 2)
    return m.dense(x, q + copy)


def mean_over_all(m: Model, x: Tensor, indices: Tensor) -> Any:
    q = m.queries(x)
    return m.dense(x, q * aten.mean.dim(q * q, [], True) * 9)


def bias_of_each_head(m: Model, x: Tensor, indices: Tensor) -> Any:
    q = m.queries(x)
    bias = aten.mean.dim(q.transpose(0, 1), [1, 2, 3], True).view(HEADS)
    return m.dense(x, q), aten.linear.default(q, m.own, bias).exp()


def index_of_each_head(m: Model, x: Tensor, indices: Tensor) -> Any:
    q = m.queries(x)
    index = aten.mean.dim(q.transpose(0, 1), [1, 2, 3], True).view(HEADS).to(torch.int64)
    return m.dense(x, q), aten.index_select.default(q, 3, index).exp()


def mask_with_heads_first(m: Model, x: Tensor, indices: Tensor) -> Any:
    """As many sequences as heads."""
    q = m.queries(x)
    seen = (q @ q.transpose(2, 3)).transpose(0, 1)[:, :1] > 0
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return m.dense(x, q, seen | causal)


def viewed_as_rows(m: Model, x: Tensor, indices: Tensor) -> Any:
    q = m.queries(x)
    return m.dense(x, q), q.squeeze(0).transpose(0, 1).view(-1, HEADS * WIDTH)


def taken_by_strides(m: Model, x: Tensor, indices: Tensor) -> Any:
    q = m.queries(x)
    return m.dense(x, q), torch.as_strided(q, (1, 3, HEADS * WIDTH), (1, HEADS * WIDTH, 1))


def cast_like_queries(m: Model, x: Tensor, indices: Tensor) -> Any:
    q = m.queries(x)
    return m.dense(x, q * m.own[0].type_as(q))


def linear_of_heads(m: Model, x: Tensor, indices: Tensor) -> Any:
    q = m.queries(x).transpose(1, 2).reshape(x.shape[0], x.shape[1], HEADS * WIDTH)
    return m.dense(x, m.square(q).view(x.shape[0], x.shape[1], HEADS, WIDTH).transpose(1, 2))


def two_attentions(m: Model, x: Tensor, indices: Tensor) -> Any:
    first, second = m.queries(x), m.queries(x.sin())
    product = first * second
    return m.dense(x, first), m.dense(x.cos(), second), product.exp()


def cast(m: Model, x: Tensor, indices: Tensor) -> Any:
    return m.dense(x, m.queries(x).to(torch.float64).to(torch.float32))


@pytest.mark.parametrize(
    ("run", "batch", "parts"),
    [
        (filled_after, 2, 0), (read_later_written_between, 2, 0), (written_through_a_view, 2, 0), (contiguous_written, 2, 0),
        (mean_over_all, 2, 0), (bias_of_each_head, 2, 1), (index_of_each_head, 2, 1), (mask_with_heads_first, 4, 0),
        (viewed_as_rows, 1, 1), (taken_by_strides, 1, 0), (cast_like_queries, 2, 0), (linear_of_heads, 2, 1),
        (two_attentions, 2, 1), (cast, 2, 1),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_by_heads(run: Callable[..., Any], batch: int, parts: int) -> None:
    assert same_in_parts(run, batch) == parts


def test_a_metadata_assert_reads_nothing() -> None:
    program, _ = exported(cast)
    runner = PieceRunner(program, None, [node.name for node in program.graph.nodes if node.target is heads.DENSE])
    [part] = [part for piece in runner.pieces for part in runner.parts(piece, ())]
    assert list(part.exits) == [part.out]


def plain(m: Model, x: Tensor, indices: Tensor) -> Any:
    nope, rope = m.queries(x).split([NOPE, ROPE], -1)
    return m.sparse(nope, rope, m.kv(x), indices).transpose(1, 2) @ m.value_up


def one_linear(m: Model, x: Tensor, indices: Tensor) -> Any:
    made, kv = m.fused(x).split([HEADS * WIDTH, LATENT + ROPE], -1)
    q = made.reshape(x.shape[0], x.shape[1], HEADS, WIDTH).transpose(1, 2)
    return m.sparse(q[..., :NOPE], q[..., NOPE:], kv, indices).transpose(1, 2) @ m.value_up


def queries_written(m: Model, x: Tensor, indices: Tensor) -> Any:
    nope, rope = m.queries(x).split([NOPE, ROPE], -1)
    nope = nope.sin()
    absorbed = nope @ m.key_up
    nope.mul_(0.0)
    rows = torch.cat([absorbed, rope], -1).transpose(1, 2)
    return torch.ops.mla2dsa.sparse_mla(rows, m.kv(x), indices, 0.3, LATENT).transpose(1, 2) @ m.value_up


def keys_written_afterwards(m: Model, x: Tensor, indices: Tensor) -> Any:
    nope, rope = m.queries(x).split([NOPE, ROPE], -1)
    kv = m.kv(x)
    attended = m.sparse(nope, rope, kv, indices)
    kv.mul_(0.0)
    return attended.transpose(1, 2) @ m.value_up


def indices_written_afterwards(m: Model, x: Tensor, indices: Tensor) -> Any:
    nope, rope = m.queries(x).split([NOPE, ROPE], -1)
    attended = m.sparse(nope, rope, m.kv(x), indices)
    indices.fill_(0)
    return attended.transpose(1, 2) @ m.value_up


def later_keys(m: Model, x: Tensor, indices: Tensor) -> Any:
    nope, rope = m.queries(x).split([NOPE, ROPE], -1)
    return m.sparse(nope, rope, m.kv(x), indices.flip(1)).transpose(1, 2) @ m.value_up


def heads_first(m: Model, x: Tensor, indices: Tensor) -> Any:
    nope, rope = m.queries(x).split([NOPE, ROPE], -1)
    return m.sparse(nope, rope, m.kv(x), indices).transpose(0, 2) @ m.value_up[0]


def keys_up_of_one_more_dim(m: Model, x: Tensor, indices: Tensor) -> Any:
    nope, rope = m.queries(x).split([NOPE, ROPE], -1)
    rows = torch.cat([nope @ m.key_up[None], rope], -1).transpose(1, 2)
    return torch.ops.mla2dsa.sparse_mla(rows, m.kv(x), indices, 0.3, LATENT).transpose(1, 2) @ m.value_up


def more_keys_than_queries(m: Model, x: Tensor, indices: Tensor) -> Any:
    nope, rope = m.queries(x).split([NOPE, ROPE], -1)
    kv = m.kv(torch.cat([x, x], 1))
    return m.sparse(nope, rope, kv, indices).transpose(1, 2) @ m.value_up


@pytest.mark.parametrize(
    ("run", "parts"),
    [
        (plain, 1), (one_linear, 1), (queries_written, 0), (keys_written_afterwards, 0), (indices_written_afterwards, 0),
        (later_keys, 1), (heads_first, 0), (keys_up_of_one_more_dim, 0), (more_keys_than_queries, 0),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_by_queries(run: Callable[..., Any], parts: int) -> None:
    assert same_in_parts(run) == parts


def test_what_grows_with_the_square_of_the_length_is_not_counted_as_a_row() -> None:
    """A mask that every head makes of its queries."""

    def run(m: Model, x: Tensor, indices: Tensor) -> Any:
        q = m.queries(x)
        return m.dense(x, q, q @ q.transpose(2, 3))

    program, _ = exported(run)
    runner = PieceRunner(program, None, [node.name for node in program.graph.nodes if node.target is heads.DENSE])
    assert max(piece.peak for piece in Footprints(runner).at(4096)) >= 4 * BATCH * HEADS * 4096**2
