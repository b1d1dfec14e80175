"""The roofline: DeepSeek's chart within 25 %, what must hold for any model, and the sources of the data file."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benchmark_scripts import script

from mla2dsa.errors import UsageError
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.cost.gpus import data, gpu_names, gpu_of, reached_on
from mla2dsa.optimizer.cost.roofline import ModelShape, Roofline, lengths_of
from mla2dsa.optimizer.cost.shape import active_parameters
from mla2dsa.optimizer.cost.tables import cost_table
from mla2dsa.passes.matching.sites import MlaDims

COST = script("cost")
NEAR = 0.25
CURVES = ("prefill dense", "prefill DSA", "decode dense", "decode DSA")
MODEL = ModelShape((MlaDims(2048, 16, None, 512, 128, 64, 128),) * 3, IndexerConfig(64, 16, 128), 1e9, 4e9, 3 * 4.5e6)
H100 = Roofline(MODEL, gpu_of("h100"))


@pytest.mark.parametrize("position", [position for position in COST.PUBLISHED if position >= 8192])
@pytest.mark.parametrize("curve", range(4), ids=CURVES)
def test_deepseek_v3_is_near_the_published_chart(position: int, curve: int) -> None:
    ours = COST.computed(COST.deepseek_v3(), position)[curve]
    assert ours == pytest.approx(COST.PUBLISHED[position][curve], rel=NEAR)


@pytest.mark.parametrize(("name", "ratio", "crossed"), [("prefill", 3.6, 10_500), ("decode", 8.8, 4_900)])
def test_deepseek_v3_has_the_published_ratio_and_crossover(name: str, ratio: float, crossed: int) -> None:
    model = COST.deepseek_v3()
    cost = getattr(model, name)
    assert cost(131072, False) / cost(131072, True) == pytest.approx(ratio, rel=NEAR)
    assert model.crossover(cost) == pytest.approx(crossed, rel=NEAR)


def test_decode_by_hand() -> None:
    """Three layers, one query, 1000 keys of 576 bf16 channels; attention reads longer than it computes with 16 heads."""
    shares = reached_on(H100.gpu).shares
    read = 3 * 1000 * 576 * 2 / (3.35e12 * shares["bandwidth"])
    assert H100.decode(1000, False) == pytest.approx(2e9 / (1978.9e12 * shares["linear"]) + read)
    few = replace(H100, batch=2)  # reading 4 GB of weights for two tokens takes longer than multiplying
    assert few.decode(1000, False) == pytest.approx(4e9 / 2 / (3.35e12 * shares["bandwidth"]) + read)


def test_bytes_by_hand() -> None:
    assert H100.cache_bytes(False) == 3 * (512 + 64) * 2
    assert H100.cache_bytes(True) == 3 * 656  # FlashMLA's fp8_ds_mla
    assert H100.index_bytes() == 3 * 132  # DeepGEMM's index key
    old = Roofline(MODEL, gpu_of("a100"))  # no FP8
    assert (old.cache_bytes(True), old.index_bytes()) == (old.cache_bytes(False), 3 * 256)
    shared = Roofline(replace(MODEL, indexer=IndexerConfig(64, 16, 128, shared=(2,))), gpu_of("h100"))
    assert shared.index_bytes() == 2 * 132
    assert H100.memory(4, 1000, False) == 4e9 + 4000 * 3 * 1152
    assert H100.memory(4, 1000, True) == 4e9 + 2 * 3 * 4.5e6 + 4000 * 3 * 788


def test_a_crossover_is_where_the_costs_cross() -> None:
    for cost in (H100.prefill, H100.decode):
        crossed = H100.crossover(cost)
        assert crossed is not None
        assert cost(crossed, True) < cost(crossed, False)
        assert cost(crossed - 1, True) >= cost(crossed - 1, False)


def test_an_indexer_that_costs_more_than_attention_never_pays() -> None:
    heavy = replace(MODEL, indexer=IndexerConfig(64, 512, 128))
    assert Roofline(heavy, gpu_of("h100")).crossover(Roofline(heavy, gpu_of("h100")).prefill) is None


@pytest.mark.parametrize("gpu", gpu_names())
def test_every_gpu_costs_more_the_longer_the_text(gpu: str) -> None:
    model = Roofline(MODEL, gpu_of(gpu))
    for cost in (model.prefill, model.decode):
        for sparse in (False, True):
            costs = [cost(length, sparse) for length in (64, 1024, 8192, 131072)]
            assert costs == sorted(costs)
            assert 0 < costs[0] < costs[-1]
    assert model.gpu.fp8 >= model.gpu.bf16


def test_the_price_is_a_factor_and_the_table_is_whole() -> None:
    cheap, dear = (cost_table(replace(H100, price=price), 5000)["dollars_per_million_tokens"] for price in (1.0, 3.0))
    assert [row["position"] for row in cheap] == [2048, 4096, 5000] == list(lengths_of(5000))
    assert dear[0]["decode_dsa"] == pytest.approx(3 * cheap[0]["decode_dsa"])
    assert dear[0]["decode_ratio"] == pytest.approx(cheap[0]["decode_ratio"])
    memory = cost_table(replace(H100, batch=7), 5000)["memory"]
    assert {row["batch"] for row in memory} == {7}
    assert all(row["gpus_dense"] == 1 for row in memory)


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match="--gpu h300: expected one of a100, h100"):
        gpu_of("h300")


def test_experts_count_by_the_share_that_a_token_is_sent_to() -> None:
    shapes = {
        "model.embed_tokens.weight": (100, 8), "lm_head.weight": (100, 8), "model.layers.0.mlp.experts.gate_up_proj": (16, 8, 8),
        "model.layers.0.mlp.shared_experts.up_proj.weight": (8, 8),
    }  # fmt: skip
    config = {"num_experts_per_tok": 2, "n_routed_experts": 16}
    assert active_parameters(shapes, config) == 800 + 64 + 2 * 64
    assert active_parameters(shapes, {}) == 800 + 64 + 16 * 64


def test_every_figure_has_its_source() -> None:
    found = data()
    entries = [*found["gpus"].values(), *found["shares"].values(), found["selection"], found["speculation"]]
    assert all(entry["source"].startswith("https://") for entry in entries)
    fitted = {name for name, share in found["shares"].items() if "FITTED" in share["what"]}
    assert fitted == {"linear", "dense_prefill"}


def test_the_page_has_the_tables_of_the_script() -> None:
    assert COST.page(COST.PAGE.read_text()) == COST.PAGE.read_text()
    assert "128K | 0.6" in COST.PAGE.read_text()
