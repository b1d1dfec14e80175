"""read_maps: the linear maps of every family, held against transformers' attention; a misreading never passes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import families
import handwritten
import pytest
import torch
import torch.nn.functional as F
from comparing import close
from saved import opened, saved, transformers_model
from torch import Tensor, nn

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig, IndexerWeights
from mla2dsa.optimizer.indexer.calibrate import Calibration, layer_samples
from mla2dsa.optimizer.indexer.closed_form import closed_form
from mla2dsa.optimizer.indexer.indexer_math import index_scores, mean_recall, rotate
from mla2dsa.optimizer.indexer.samples import SiteMaps, SiteSample
from mla2dsa.optimizer.indexer.site_maps import check_maps, read_maps, rope_order
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.passes.matching.sites import MlaSite
from mla2dsa.passes.tap import TABLE_TAPS, tap
from mla2dsa.runtime.execute import PieceRunner

FAMILIES = ("deepseek_v3", "deepseek_v3-halfsplit", "glm4_moe_lite", "youtu", "minicpm3", "deepseek_v2",
            "deepseek_v2-lite", "mistral4", "longcat_flash")  # fmt: skip
CALIBRATION = Calibration(IndexerConfig(index_topk=8, index_n_heads=4, index_head_dim=48), rows=12)
LENGTH = 40

Layer = tuple[MlaSite, list[SiteSample], SiteMaps]


def layers_of(source: WeightSource, length: int = LENGTH) -> list[Layer]:
    """Every layer with its samples and checked maps."""
    ids = [families.inputs(1, length, seed=seed)["input_ids"][0] for seed in range(2)]
    return [(site, samples, maps()) for site, samples, maps in layer_samples(source, ids, CALIBRATION)]


def attention_mass(maps: SiteMaps, sample: SiteSample) -> Tensor:
    """[R, T], written from the formula in the docstring of SiteMaps."""
    raw = maps.raw_latent(sample.hidden)
    latent = maps.latent_gain * raw / (raw.square().mean(-1, keepdim=True) + maps.latent_eps).sqrt()
    u, rows = sample.q_resid[sample.rows], sample.rows
    logits = torch.einsum("hrq,tq,sr->hts", maps.q_absorbed, u, latent)
    turned = rotate(torch.einsum("hdq,tq->thd", maps.q_rope, u), sample.cos[rows][:, None], sample.sin[rows][:, None])
    logits += torch.einsum("thd,sd->hts", turned, rotate(maps.raw_k_rope(sample.hidden), sample.cos, sample.sin))
    future = torch.arange(len(sample.hidden)) > rows[:, None]
    return (maps.scale * logits).masked_fill(future, -torch.inf).softmax(-1).mean(0)


# Every family


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_reproduce_the_dense_attention(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """check_maps has passed for every layer (it runs inside), and the whole formula gives the attention it should."""
    layers = layers_of(opened(saved(name, tmp_path_factory)))
    assert [site.name for site, _, _ in layers] == list(families.FAMILIES[name].sites)
    for _, samples, maps in layers:
        for sample in samples:
            close(attention_mass(maps, sample), sample.mass, of_max=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "minicpm3"])
def test_maps_reproduce_transformers_attention(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(name, tmp_path_factory)
    layers, model = layers_of(opened(folder)), transformers_model(folder)
    with torch.no_grad():
        seen = model(families.inputs(1, LENGTH, seed=0)["input_ids"], output_attentions=True).attentions
    for (_, samples, maps), weights in zip(layers, seen, strict=True):
        sample = samples[0]
        close(attention_mass(maps, sample), weights[0].mean(0)[sample.rows], of_max=1e-5)


@pytest.mark.parametrize(("name", "interleaved"), [("deepseek_v3", True), ("deepseek_v3-halfsplit", False)])
def test_maps_are_the_weights_by_name(name: str, interleaved: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = opened(saved(name, tmp_path_factory))
    _, _, maps = layers_of(source)[1]

    def weight(tensor: str) -> Tensor:
        return source.checkpoint.load(f"model.layers.1.self_attn.{tensor}.weight")

    query, up = weight("q_b_proj").view(4, 24, 48), weight("kv_b_proj").view(4, 28, 32)
    order = [0, 2, 4, 6, 1, 3, 5, 7] if interleaved else list(range(8))
    close(maps.q_absorbed, up[:, :16].transpose(1, 2) @ query[:, :16], of_max=1e-6)
    assert torch.equal(maps.q_rope, query[:, 16:][:, order])
    assert torch.equal(maps.latent, weight("kv_a_proj_with_mqa")[:32])
    assert torch.equal(maps.k_rope, weight("kv_a_proj_with_mqa")[32:][order])
    close(maps.latent_gain, weight("kv_a_layernorm"), of_max=1e-6)
    assert maps.latent_eps == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("size", [0.0, 1e-5, 1e-3], ids=["zeros", "epsilon alone", "beside epsilon"])
def test_tokens_that_embed_as_next_to_nothing(size: float, tmp_path: Path) -> None:
    """Of these the norms' epsilon is what they are divided by. An embedding has such rows for tokens that no training showed."""
    model = families.build("deepseek_v3")
    model.model.embed_tokens.weight.data[::4] *= size  # type: ignore[union-attr, operator, index]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    for _, samples, maps in layers_of(opened(tmp_path)):
        close(attention_mass(maps, samples[0]), samples[0].mass, of_max=1e-5)
        found = closed_form(maps, samples, CALIBRATION.config)
        assert all(bool(tensor.isfinite().all()) for tensor in found.weights.tensors().values())


def test_channels_of_a_complex_rotary_table_are_put_in_half_split_order(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    site, _, _ = layers_of(opened(saved("deepseek_v2", tmp_path_factory)))[0]
    assert site.rope is not None
    assert site.rope.complex_table
    assert rope_order(site) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_longcats_scales_are_in_the_maps(tmp_path_factory: pytest.TempPathFactory) -> None:
    """mla_scale_q_lora multiplies the query, mla_scale_kv_lora the latent: constants of the graph, no weights."""
    source = opened(saved("longcat_flash", tmp_path_factory))
    _, _, maps = layers_of(source)[0]
    norm = source.checkpoint.load("model.layers.0.self_attn.0.kv_a_layernorm.weight")
    query = source.checkpoint.load("model.layers.0.self_attn.0.q_b_proj.weight").view(4, 24, 48)
    kv_scale, q_scale = (64 / 32) ** 0.5, (64 / 48) ** 0.5
    close(maps.latent_gain, norm * kv_scale, of_max=1e-6)
    close(maps.q_rope, query[:, 16:][:, [0, 2, 4, 6, 1, 3, 5, 7]] * q_scale, of_max=1e-6)


def test_without_query_latent_the_maps_read_the_hidden_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, samples, maps = layers_of(opened(saved("deepseek_v2-lite", tmp_path_factory)))[0]
    assert maps.q_absorbed.shape == (4, 32, 64)
    assert torch.equal(samples[0].q_resid, samples[0].hidden)


def test_mistral4_scales_far_queries_by_their_position(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Past original_max_position_embeddings (128 here) the query is not linear in u alone, and that is said."""
    source = opened(saved("mistral4", tmp_path_factory))
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn: the query read off the graph is not"):
        layers_of(source, length=200)


# Misreadings


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    return layers_of(opened(saved("deepseek_v3", tmp_path_factory)))[1]


@pytest.mark.parametrize(
    ("field", "change", "what"),
    [
        ("q_absorbed", lambda t: t[[1, 0, 2, 3]], "query"),
        ("q_absorbed", lambda t: t * 1.01, "query"),
        ("q_absorbed", lambda t: t * float("nan"), "query"),
        ("q_rope", lambda t: t[:, [0, 4, 1, 5, 2, 6, 3, 7]], "rotary query"),
        ("q_rope", lambda t: -t, "rotary query"),
        ("latent", lambda t: t[[1, 0, *range(2, 32)]], "latent"),
        ("latent_gain", lambda t: t.roll(1), "latent"),
        ("latent_gain", lambda t: t * 1.01, "latent"),
        ("k_rope", lambda t: t[[0, 4, 1, 5, 2, 6, 3, 7]], "rotary key"),
        ("k_rope", lambda t: t.roll(1, 0), "rotary key"),
    ],
    ids=["heads-swapped", "query-scaled", "nan", "pairs-mixed", "rotary-sign", "rows-swapped", "gain-shifted",
         "gain-scaled", "key-pairs-mixed", "key-shifted"],
)  # fmt: skip
def test_a_wrong_map_does_not_pass(layer: Layer, field: str, change: object, what: str) -> None:
    site, samples, maps = layer
    check_maps(site, maps, samples[0])
    wrong = dataclasses.replace(maps, **{field: change(getattr(maps, field))})  # type: ignore[operator]
    with pytest.raises(
        UserError, match=rf"^model\.layers\.1\.self_attn: the {what} read off the graph is not"
    ) as error:
        check_maps(site, wrong, samples[0])
    assert "--indexer donor:PATH" in str(error.value)


@pytest.mark.parametrize("field", ["query", "key"])
def test_another_layers_sample_does_not_pass(layer: Layer, field: str) -> None:
    site, samples, maps = layer
    shuffled = dataclasses.replace(samples[0], **{field: getattr(samples[0], field).flip(0)})
    with pytest.raises(UserError, match="not what the dense model computes"):
        check_maps(site, maps, shuffled)


def scores_of(weights: IndexerWeights, sample: SiteSample) -> Tensor:
    return index_scores(weights, CALIBRATION.config, sample, sample.rows)


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3"])
def test_attention_bias_is_read_and_used(family: str, tmp_path: Path) -> None:
    """The maps have it, and the closed form selects better with it than without."""
    model = families.build(family, attention_bias=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_a_proj.bias", "kv_a_proj_with_mqa.bias", "o_proj.bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    recalls = []
    for _, samples, maps in layers_of(opened(tmp_path)):
        close(attention_mass(maps, samples[0]), samples[0].mass, of_max=1e-5)
        assert maps.latent_bias is not None
        for used in (maps, dataclasses.replace(maps, latent_bias=None, k_rope_bias=None)):
            weights = closed_form(used, samples, CALIBRATION.config).weights
            scores = functools.partial(scores_of, weights)
            recalls.append(mean_recall(scores, samples, CALIBRATION.config.index_topk))
    assert sum(recalls[::2]) > sum(recalls[1::2])


# Attentions of other spellings


class PeFirst(handwritten.Mla):
    def queries(self, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        return torch.cat([q_pe, q_nope], -1)

    def keys(self, k_nope: Tensor, k_pe: Tensor) -> Tensor:
        return torch.cat([k_pe.expand(-1, self.d.heads, -1, -1), k_nope], -1)


class NoPe(handwritten.Mla):
    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        return x


class FusedDown(handwritten.Mla):
    """q_a and kv_a are one projection: the latent's rows do not begin at 0."""

    def __init__(self, dims: handwritten.Dims) -> None:
        super().__init__(dims)
        self.q_a = self.kv_a = None  # type: ignore[assignment]
        self.fused = nn.Linear(dims.hidden, dims.q_rank + dims.rope + dims.rank, bias=False)

    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k_pe, latent = self.fused(x).split([self.d.q_rank, self.d.rope, self.d.rank], -1)
        return handwritten.rms(q, self.q_norm), handwritten.rms(latent, self.kv_norm), k_pe


class ScaledQuery(handwritten.Mla):
    def queries(self, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        return super().queries(q_nope * 0.7, q_pe * 1.3)


class NormedQuery(handwritten.Mla):
    """Each head's query is normalised: no linear map of u."""

    def queries(self, q_nope: Tensor, q_pe: Tensor) -> Tensor:
        return F.normalize(super().queries(q_nope, q_pe), dim=-1)


class LayerNormedLatent(handwritten.Mla):
    def latents(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latent, k_pe = self.kv_a(x).split([self.d.rank, self.d.rope], -1)
        return handwritten.rms(self.q_a(x), self.q_norm), F.layer_norm(latent, (self.d.rank,)), k_pe


def tapped_layer(attention: type[handwritten.Mla]) -> tuple[MlaSite, SiteSample, SiteMaps]:
    """Site, sample and maps of a hand-written attention, through the tap pass."""
    model = handwritten.build(attention)
    tapped = tap(handwritten.export(model), rows=5)
    [site], program = tapped.found.sites, tapped.program
    x, mask, pos = handwritten.inputs(model, 1, 20)
    batch = {"x": x, "mask": mask, "pos": pos, "tap_rows": torch.tensor([3, 7, 8, 15, 19])}
    seen = {
        **batch,
        **next(PieceRunner(program).run([batch], list(tapped.taps.values()))).values,
    }  # x is the hidden state

    def value(name: str) -> Tensor:
        return seen[tapped.taps[f"{site.name}.{name}"]][0].float()

    empty = torch.zeros(20, 0)
    cos, sin = (value(name) if site.rope is not None else empty for name in TABLE_TAPS)
    named = {name: value(name) for name in ("hidden", "q_resid", "query", "key", "mass")}
    sample = SiteSample(cos=cos, sin=sin, rows=batch["tap_rows"], **named)
    weights = {**program.state_dict, **program.constants}
    maps = read_maps(site, program.graph_signature.inputs_to_parameters, lambda name: weights[name])
    return site, sample, maps


@pytest.mark.parametrize(
    "attention", [handwritten.Mla, PeFirst, NoPe, FusedDown, ScaledQuery], ids=lambda a: a.__name__
)
def test_other_spellings(attention: type[handwritten.Mla]) -> None:
    site, sample, maps = tapped_layer(attention)
    check_maps(site, maps, sample)
    close(attention_mass(maps, sample), sample.mass, of_max=1e-5)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [(NormedQuery, "the query is not a selection of its projection's rows"),
     (LayerNormedLatent, "the latent is not an RMS norm of the projection's rows")],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_is_not_linear_is_refused(attention: type[handwritten.Mla], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        tapped_layer(attention)
    assert str(error.value).startswith("self_attn: ")
    assert "\n" not in str(error.value)
