"""Sparse attention in tiles of queries gives what it gives whole, in less memory, and only where nobody looks inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from comparing import close
from saved import captured, config_dict, tensors
from torch import Tensor

from mla2dsa.optimizer.proof import baselines
from mla2dsa.passes.mla_to_dsa import Converted, mla_to_dsa, prepare
from mla2dsa.runtime.execute import PieceRunner
from mla2dsa.runtime.footprint import Footprints
from mla2dsa.runtime.tiled import queries
from mla2dsa.runtime.tiled.expanded import Either

SPARSE_MLA = torch.ops.mla2dsa.sparse_mla.default
TOPK, TILE, LENGTH = 16, 8, 45  # a last tile that is shorter, and tiles with fewer keys than index_topk
FAMILIES = ("deepseek_v3", "deepseek_v2", "minicpm3")


@pytest.fixture(scope="module", params=FAMILIES)
def converted(request: pytest.FixtureRequest) -> Converted:
    return sparse(request.param)


def sparse(name: str) -> Converted:
    model = families.build(name)
    program = families.export(model)
    config = families.IndexerConfig(TOPK, 4, 16)
    weights = {
        site.name: families.indexer_weights(config, site.dims.hidden_size, site.dims.q_width)
        for site in prepare(program)[1].sites
    }
    return mla_to_dsa(program, config, weights)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "tile_rows", lambda *_: TILE)


def runner(converted: Converted, overrides: dict[Any, Any] | None = None, tiled: bool = True) -> PieceRunner:
    made = PieceRunner(converted.program, None, [change.after for change in converted.changes], overrides)
    made._tiled = tiled
    return made


def test_every_layer_is_found(converted: Converted) -> None:
    made = runner(converted)
    found = [chain for piece in made.pieces for chain in made.parts(piece, ())]
    assert [chain.out.name for chain in found] == [change.after for change in converted.changes]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("choose", [None, baselines.oracle, baselines.window], ids=["dsa", "oracle", "window"])
def test_tiles_are_the_whole(converted: Converted, choose: Callable[..., Any] | None) -> None:
    given = [tensors(families.inputs(1, LENGTH, 0))]
    overrides: dict[Any, Any] = {} if choose is None else {SPARSE_MLA: choose}
    widths: list[tuple[int, int]] = []

    def counted(q: Any, kv: Any, *rest: Any) -> Any:
        widths.append((q.shape[1], kv.shape[1]))
        return overrides.get(SPARSE_MLA, SPARSE_MLA)(q, kv, *rest)

    [whole] = next(runner(converted, overrides, tiled=False).outputs_of(given))
    [tiled] = next(runner(converted, {SPARSE_MLA: counted}).outputs_of(given))
    close(tiled, whole, rtol=1e-4, atol=1e-5)
    ends = [*range(TILE, LENGTH, TILE), LENGTH]
    assert widths == [(min(TILE, end - start), end) for start, end in zip([0, *ends], ends, strict=False)] * len(
        converted.changes
    )


@pytest.mark.usefixtures("small")
def test_padding_on_the_left(converted: Converted) -> None:
    given = [tensors(families.inputs(2, LENGTH, 7))]
    [whole] = next(runner(converted, tiled=False).outputs_of(given))
    [tiled] = next(runner(converted).outputs_of(given))
    close(tiled[1], whole[1], rtol=1e-4, atol=1e-5)
    close(tiled[0, 7:], whole[0, 7:], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small")
def test_what_somebody_looks_at_is_whole() -> None:
    converted = sparse("deepseek_v3")
    made, given = runner(converted), [tensors(families.inputs(1, LENGTH, 0))]
    (first, *_) = [chain for piece in made.pieces for chain in made.parts(piece, ())]
    for node in first.inside:
        shown = [part for piece in made.pieces for part in made.parts(piece, {node.name})]
        if node in first.around:
            assert len(shown) == len(converted.changes) - 1
        else:  # queries are whole, what is made of them is not
            assert [len(part.inside) for part in shown] == [len(first.around), len(first.inside)]
    names = [node.name for node in first.inside if isinstance(node.meta["val"], Tensor)]
    [seen] = [found.values for found in made.run(given, names) if found.values]
    assert set(seen) == set(names)


def test_a_session_is_not_tiled() -> None:
    """What a cache holds after a query's own key may be anybody's. Its attention may be run in another form, where nobody looks."""
    made = PieceRunner(sparse("deepseek_v3").program)
    [piece] = made.pieces
    found = made.parts(piece, ())
    assert [type(part) for part in found] == [Either] * 2
    assert all(not part.chain.queries for part in found if isinstance(part, Either))
    assert made.parts(piece, [found[0].inside[0].name]) == found[1:]
    assert PieceRunner(sparse("deepseek_v3").program, overrides={SPARSE_MLA: SPARSE_MLA}).parts(piece, ()) == []


def test_no_more_memory_than_a_tile() -> None:
    """Absorbed queries and what they attend to are the largest things there are."""
    heads, latent, length = 16, 256, 32768
    wide = {"num_attention_heads": heads, "num_key_value_heads": heads, "kv_lora_rank": latent, "num_hidden_layers": 2}
    program = captured(config_dict("deepseek_v3", **wide)).program
    converted = mla_to_dsa(program, families.IndexerConfig(TOPK, 4, 16))
    whole, tiled = (
        max(piece.peak for piece in Footprints(runner(converted, tiled=how)).at(length)) for how in (False, True)
    )
    assert tiled <= whole - 4 * length * heads * latent


@pytest.mark.parametrize("heads", [1, 16, 64, 128])
def test_rows_of_a_tile(heads: int) -> None:
    width = 3 * 512 + 64
    rows = queries.tile_rows(1, heads, width)
    assert rows % queries.LEAST_ROWS == 0
    assert rows >= 320
    assert rows * heads * width * 4 <= queries.TILE_BYTES
    assert queries.tile_rows(64, 128, width) == queries.LEAST_ROWS
