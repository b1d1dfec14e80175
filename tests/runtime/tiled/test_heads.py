"""Dense attention some heads at a time gives what it gives whole, in less memory, and only where every head is on its own."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from comparing import close
from saved import captured, config_dict, tensors
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mla2dsa.passes.tap import ROWS_INPUT, tap
from mla2dsa.runtime.execute import PieceRunner
from mla2dsa.runtime.footprint import Footprints
from mla2dsa.runtime.tiled import heads

LENGTH = 21
DENSE = heads.DENSE


@pytest.fixture(params=[1, 3], ids=["one head at a time", "three, and one"])
def some(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(heads, "heads_at_once", lambda all_heads, *_: min(all_heads, request.param))
    return int(request.param)


def cores(program: ExportedProgram) -> list[str]:
    return [node.name for node in program.graph.nodes if node.target is DENSE]


def runner(program: ExportedProgram, tiled: bool = True, **options: Any) -> PieceRunner:
    made = PieceRunner(program, None, cores(program), **options)
    made._tiled = tiled
    return made


def found(program: ExportedProgram) -> list[Any]:
    made = PieceRunner(program, None, cores(program))
    return [part for piece in made.pieces for part in made.parts(piece, ())]


@pytest.fixture(scope="module", params=families.DENSE)
def program(request: pytest.FixtureRequest) -> ExportedProgram:
    return families.export_anchored(families.build(request.param))


@pytest.mark.parametrize("some", [3], ids=["three, and one"], indirect=True)
def test_every_family_by_heads(program: ExportedProgram, some: int) -> None:
    calls: list[int] = []

    def counted(q: Tensor, *rest: Any) -> Any:
        calls.append(q.shape[1])
        return DENSE(q, *rest)

    given = [tensors(families.inputs(2, LENGTH, 5))]
    [whole, *_] = next(runner(program, tiled=False).outputs_of(given))
    [apart, *_] = next(runner(program, overrides={DENSE: counted}).outputs_of(given))
    close(apart, whole, rtol=1e-4, atol=1e-5)
    each = [min(some, 4 - start) for start in range(0, 4, some)]
    assert calls == each * len(cores(program))


def test_what_calibration_sees(some: int) -> None:
    """Rows of the queries are put together of all heads; queries as such are not kept."""
    tapped = tap(families.export_anchored(families.build("deepseek_v3")), rows=3)
    watched = list(tapped.taps.values())
    given = [{**tensors(families.inputs(1, LENGTH, 0)), ROWS_INPUT: torch.tensor([0, 7, LENGTH - 1])}]
    made = runner(tapped.program)
    parts = [part for piece in made.pieces for part in made.parts(piece, watched)]
    assert len(parts) == 2
    for part in parts:
        first, *rows = part.exits
        assert first is part.out
        assert rows
        assert all(node.meta["val"].shape[2] == 3 for node in rows)
    whole, apart = (
        {
            name: value
            for seen in runner(tapped.program, tiled).run(given, watched)
            for name, value in seen.values.items()
        }
        for tiled in (False, True)
    )
    assert whole.keys() == apart.keys() == set(watched)
    for name in watched:
        close(apart[name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("some")
def test_anything_inside_can_be_looked_at() -> None:
    program = families.export_anchored(families.build("deepseek_v3"))
    given = [tensors(families.inputs(1, LENGTH, 0))]
    inside = [node.name for part in found(program) for node in part.inside if isinstance(node.meta["val"], Tensor)]
    assert len(inside) > 20
    whole, apart = (
        {name: value for seen in runner(program, tiled).run(given, inside) for name, value in seen.values.items()}
        for tiled in (False, True)
    )
    assert whole.keys() == apart.keys() == set(inside)
    for name in inside:
        close(apart[name], whole[name], rtol=1e-4, atol=1e-5)


class Small(nn.Module):
    """Attention of four heads, and something beside it."""

    def __init__(self, beside: str) -> None:
        super().__init__()
        self.beside = beside
        self.q, self.kv, self.o = nn.Linear(16, 32), nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, 4, 8).transpose(1, 2)
        k, v = self.kv(x).view(batch, tokens, -1, 16).transpose(1, 2).split([8, 8], -1)
        extra = x.new_zeros(())
        if self.beside == "softmax over heads":
            k = torch.softmax(k, 1)
        elif self.beside == "sum over heads":
            q = q + q.sum(1, keepdim=True)
        elif self.beside == "other heads":
            k = k.flip(1)
        elif self.beside == "read before":
            extra = (q * q).sum()
        elif self.beside == "written before":
            x.mul_(2.0)
        out = torch.ops.mla2dsa.dense_attention(q, k, v, None, 0.3)
        if self.beside == "read afterwards":
            extra = q.exp().sum(1)[..., :1]
        elif self.beside == "written afterwards":
            q.mul_(3.0)
            extra = q.sum()
        return self.o(out.transpose(1, 2).reshape(batch, tokens, 32)) + extra


def exported(beside: str) -> ExportedProgram:
    torch.manual_seed(0)
    model = Small(beside).requires_grad_(False)
    return torch.export.export(model, (torch.randn(2, 5, 16),), dynamic_shapes={"x": {1: Dim("tokens", min=2, max=64)}})


@pytest.fixture
def given() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(2, 9, 16)}


@pytest.mark.parametrize(
    ("beside", "apart"),
    [
        ("nothing", True), ("read afterwards", True), ("softmax over heads", False), ("sum over heads", False),
        ("other heads", False), ("read before", False), ("written before", False), ("written afterwards", False),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.usefixtures("some")
def test_only_where_every_head_is_on_its_own(beside: str, apart: bool, given: dict[str, Tensor]) -> None:
    program = exported(beside)
    assert len(found(program)) == apart
    [whole] = next(runner(program, tiled=False).outputs_of([given]))
    [same] = next(runner(program).outputs_of([given]))
    close(same, whole, rtol=1e-5, atol=1e-6)


def test_less_memory_at_length() -> None:
    """What is whole is the attention's result, not queries, keys and values."""
    wide = {"num_attention_heads": 64, "num_key_value_heads": 64, "num_hidden_layers": 2}
    program = captured(config_dict("deepseek_v3", **wide)).program
    length = 32768
    whole, apart = (max(f.peak for f in Footprints(runner(program, tiled)).at(length)) for tiled in (False, True))
    made = next(part.width for part in found(program))
    assert made >= 2 * 24 + 28  # queries twice, keys and values
    assert whole - apart >= 4 * length * 64 * made // 2


@pytest.mark.parametrize(("tokens", "expected"), [(0, 64), (4096, 16), (32768, 2), (2**20, 1)])
def test_heads_at_once(tokens: int, expected: int) -> None:
    assert heads.heads_at_once(64, tokens, 1000) == expected
