"""add_cache: signature, exactness against the uncached program in chunks, padding on both sides, save and load."""

from pathlib import Path

import pytest
import torch
from families import exported
from torch import Tensor
from torch.export import ExportedProgram

from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.passes.add_cache import Cached, add_cache
from mla2dsa.passes.mla_to_dsa import Converted, mla_to_dsa
from mla2dsa.runtime.execute import PieceRunner

FAMILIES = ("deepseek_v3", "deepseek_v2-lite")
CAPACITY = 48


def converted(family: str) -> Converted:
    """index_topk 8 of up to 40 tokens, random indexers."""
    _, program = exported(family, "sdpa")
    config = IndexerConfig(index_topk=8, index_n_heads=16, index_head_dim=32)
    result = mla_to_dsa(program, config)
    generator = torch.Generator().manual_seed(0)
    for name in result.added:
        meta = result.program.state_dict[name]
        drawn = torch.randn(meta.shape, generator=generator, dtype=meta.dtype) * 0.3
        result.program.state_dict[name] = torch.nn.Parameter(drawn, requires_grad=False)
    return result


def cached(result: Converted, last_only: bool = False) -> Cached:
    return add_cache(result.program, [change.name for change in result.changes], last_only)


def empty(caches: Cached, batch: int) -> dict[str, Tensor]:
    """past_* inputs full of NaN: a slot that was not written must never be read."""
    widths = {}
    for spec in caches.caches:
        widths |= {f"past_{spec.latent}": spec.latent_width, f"past_{spec.index_key}": spec.index_key_width}
    return {name: torch.full((batch, CAPACITY, width), float("nan")) for name, width in widths.items()}


def step(
    runner: PieceRunner, past: dict[str, Tensor], ids: Tensor, positions: Tensor, **others: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = {
        "input_ids": ids,
        "position_ids": positions,
        "slots": positions,
        "key_begin": torch.zeros(len(ids), dtype=torch.int64),
    }
    logits, *present = next(runner.outputs_of([{**inputs, **past, **others}]))
    return logits, dict(zip(_past_names(runner), present, strict=True))


def _past_names(runner: PieceRunner) -> list[str]:
    return [node.name for node in runner._inputs if node.name.startswith("past_")]


def tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(length))
    return ids, torch.arange(length).expand(batch, -1)


def uncached(program: ExportedProgram, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return next(
        PieceRunner(program).outputs_of([{"input_ids": ids, "attention_mask": mask, "position_ids": positions}])
    )[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [(40,), (17, 23), (30, *[1] * 10)], ids=["whole", "chunks", "decode"])
def test_chunks_equal_the_uncached_program(family: str, chunks: tuple[int, ...]) -> None:
    result = converted(family)
    caches = cached(result)
    runner, past = PieceRunner(caches.program), empty(caches, 2)
    ids, positions = tokens(2, sum(chunks))
    parts, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        logits, past = step(runner, past, ids[:, part], positions[:, part])
        parts.append(logits)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), uncached(result.program, ids), atol=1e-4, rtol=1e-4)


def test_left_padding() -> None:
    result = converted("deepseek_v3")
    caches = cached(result)
    ids, slots = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    begin = torch.tensor([6, 0])
    logits, _ = step(PieceRunner(caches.program), empty(caches, 2), ids, positions, slots=slots, key_begin=begin)
    live = mask.bool()
    torch.testing.assert_close(logits[live], uncached(result.program, ids, mask)[live], atol=1e-4, rtol=1e-4)


def test_last_only_is_the_last_row() -> None:
    result = converted("deepseek_v3")
    every, last = cached(result), cached(result, last_only=True)
    ids, positions = tokens(2, 12)
    full, _ = step(PieceRunner(every.program), empty(every, 2), ids, positions)
    one, _ = step(PieceRunner(last.program), empty(last, 2), ids, positions, last=torch.tensor([11, 4]))
    torch.testing.assert_close(one[:, 0], torch.stack([full[0, 11], full[1, 4]]))


def test_signature() -> None:
    result = converted("deepseek_v3")
    before = [node.name for node in result.program.graph.nodes]
    caches = cached(result)
    inputs = set(caches.program.graph_signature.user_inputs)
    assert "attention_mask" not in inputs
    assert {"input_ids", "position_ids", "slots", "key_begin"} < inputs
    assert [(spec.latent_width, spec.index_key_width) for spec in caches.caches] == [(32 + 8, 32)] * len(result.changes)
    assert [spec.layer for spec in caches.caches] == [change.name for change in result.changes]
    assert [node.name for node in result.program.graph.nodes] == before


def test_it_survives_save_and_load(tmp_path: Path) -> None:
    caches = cached(converted("deepseek_v3"))
    ids, positions = tokens(1, 20)
    expected, _ = step(PieceRunner(caches.program), empty(caches, 1), ids, positions)
    torch.export.save(caches.program, tmp_path / "cached.pt2")
    again = torch.export.load(tmp_path / "cached.pt2")
    got, _ = step(PieceRunner(again), empty(caches, 1), ids, positions)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
