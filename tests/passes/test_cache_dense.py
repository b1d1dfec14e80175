"""cache_dense: exact against the uncached program in chunks and with padding; what it refuses."""

from __future__ import annotations

import functools

import pytest
import torch
from families import exported
from torch import Tensor
from torch.export import ExportedProgram

from mla2dsa.errors import UserError
from mla2dsa.passes.cache_dense import ATTENTION, DenseCached, dense_cached_of
from mla2dsa.passes.manager import run_passes
from mla2dsa.passes.pipeline import dense_cached_passes
from mla2dsa.runtime.execute import PieceRunner

CAPACITY = 48
LENGTH = 24


@functools.cache
def dense() -> ExportedProgram:
    return exported("deepseek_v3", "anchor")[1]


@functools.cache
def cached(last_only: bool = False) -> DenseCached:
    return dense_cached_of(run_passes(dense(), dense_cached_passes(last_only)))


def stale(batch: int) -> dict[str, Tensor]:
    """past_* inputs full of large numbers: a slot that was not written must weigh nothing."""
    widths = {name: width for spec in cached().caches for name, width in spec.widths.items()}
    return {f"past_{name}": torch.full((batch, CAPACITY, width), 1e3) for name, width in widths.items()}


def tokens(batch: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 100, (batch, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(LENGTH).expand(batch, -1)


def step(program: ExportedProgram, past: dict[str, Tensor], **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits, *present = next(PieceRunner(program).outputs_of([{**inputs, **past}]))
    return logits, dict(zip(past, present, strict=True))


def uncached(ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits: Tensor = next(PieceRunner(dense()).outputs_of([inputs]))[0]
    return logits


@pytest.mark.parametrize("chunks", [(24,), (9, 15), (20, 1, 1, 1, 1)], ids=["whole", "chunks", "decode"])
def test_chunks_equal_the_uncached_program(chunks: tuple[int, ...]) -> None:
    ids, positions = tokens(2)
    past, begin, start, parts = stale(2), torch.zeros(2, dtype=torch.int64), 0, []
    for size in chunks:
        part = slice(start, start + size)
        at = positions[:, part]
        logits, past = step(cached().program, past, input_ids=ids[:, part], position_ids=at, slots=at, key_begin=begin)
        parts.append(logits)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), uncached(ids), atol=1e-4, rtol=1e-4)


def test_left_padding() -> None:
    ids, slots = tokens(2)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits, _ = step(
        cached().program, stale(2), input_ids=ids, position_ids=positions, slots=slots, key_begin=torch.tensor([6, 0])
    )
    live = mask.bool()
    torch.testing.assert_close(logits[live], uncached(ids, mask)[live], atol=1e-4, rtol=1e-4)


def test_last_only_is_the_last_row() -> None:
    ids, at = tokens(2)
    inputs = {"input_ids": ids, "position_ids": at, "slots": at, "key_begin": torch.zeros(2, dtype=torch.int64)}
    one, _ = step(cached(last_only=True).program, stale(2), **inputs, last=torch.tensor([23, 4]))
    full = uncached(ids)
    torch.testing.assert_close(one[:, 0], torch.stack([full[0, 23], full[1, 4]]), atol=1e-4, rtol=1e-4)


def test_the_attention_is_left_as_it_is() -> None:
    """As many dense attentions as before, and none of the DSA ops but the one that writes caches."""
    counts = [sum(node.target is ATTENTION for node in it.graph.nodes) for it in (dense(), cached().program)]
    assert counts == [2, 2]
    ours = {str(node.target) for node in cached().program.graph.nodes if str(node.target).startswith("mla2dsa")}
    assert not ours & {"mla2dsa.sparse_mla.default", "mla2dsa.lightning_indexer.default"}
    assert "attention_mask" not in cached().program.graph_signature.user_inputs


@pytest.mark.parametrize(
    ("attention", "layers", "message"),
    [("sdpa", 2, "captured as sdpa, expected anchor"), ("anchor", 3, "2 of 3 layers are MLA")],
    ids=["other-capture", "hybrid"],
)
def test_refusals(attention: str, layers: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_passes(exported("deepseek_v3", attention)[1], dense_cached_passes(True, layers))
