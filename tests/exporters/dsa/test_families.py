"""Every rule against transformers: the DSA class reads the dense model out of what is written, and `strip` undoes it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents
from families import build, indexer_weights
from safetensors import safe_open
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.exporters.dsa.config import dsa_config
from mla2dsa.exporters.dsa.families import FAMILIES, GLM, LAYOUTS, NO_CLASS, OWN, V32
from mla2dsa.exporters.dsa.layout import Layout, choose
from mla2dsa.exporters.dsa.names import DERIVED_SHARD, INDEXER_SHARD, ORIGINALS
from mla2dsa.exporters.dsa.strip import strip
from mla2dsa.files.json_files import read_json
from mla2dsa.files.safetensors_index import read_index
from mla2dsa.kernels.spec import IndexerConfig

INDEXER = IndexerConfig(index_topk=48, index_n_heads=4, index_head_dim=16)
FOLDED = 1e-5  # relative; what the gate of a conversion allows


@dataclass(frozen=True)
class Case:
    """A model of tests/helpers/families.py and how it is written. limit: relative, of the logits; 0 is bit for bit."""

    family: str
    layout: str
    limit: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    form: str = ""
    untie: bool = False
    rewritten: tuple[str, ...] = ()  # tensors of the first layer that are made anew
    embedding: float = 1.0


V3_NO_LATENT = {"q_lora_rank": None}
ROTARY = ("self_attn.kv_a_proj_with_mqa.weight", "self_attn.q_b_proj.weight")
NEW_LATENT = ("self_attn.q_a_layernorm.weight", "self_attn.q_a_proj.weight", "self_attn.q_b_proj.weight")
CASES = {
    "v3": Case("deepseek_v3", "deepseek_v32"),
    "v3-as-glm": Case("deepseek_v3", "glm_moe_dsa"),
    "v3-halves": Case("deepseek_v3-halfsplit", "deepseek_v32", rewritten=ROTARY),
    "v3-halves-as-glm": Case("deepseek_v3-halfsplit", "glm_moe_dsa", rewritten=ROTARY),
    "v3-bias": Case("deepseek_v3", "deepseek_v32", options={"attention_bias": True}),
    "v3-halves-bias": Case(
        "deepseek_v3-halfsplit", "deepseek_v32", options={"attention_bias": True},
        rewritten=("self_attn.kv_a_proj_with_mqa.bias", *ROTARY),
    ),
    "v3-tied": Case("deepseek_v3", "deepseek_v32", options={"tie_word_embeddings": True}),
    "v3-untied": Case("deepseek_v3", "deepseek_v32", options={"tie_word_embeddings": True}, untie=True),
    "glm4": Case("glm4_moe_lite", "deepseek_v32"),
    "glm4-as-glm": Case("glm4_moe_lite", "glm_moe_dsa"),
    "glm4-halves": Case("glm4_moe_lite", "deepseek_v32", options={"rope_interleave": False}, rewritten=ROTARY),
    "youtu": Case("youtu", "deepseek_v32"),
    "youtu-as-glm": Case("youtu", "glm_moe_dsa"),
    "youtu-untied": Case("youtu", "deepseek_v32", untie=True),
    "minicpm3": Case(
        "minicpm3", "deepseek_v32", FOLDED, {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 48},
        rewritten=("mlp.down_proj.weight", ROTARY[0], "self_attn.o_proj.weight", ROTARY[1]),
    ),
    "minicpm3-as-glm": Case(
        "minicpm3", "glm_moe_dsa", FOLDED, {"tie_word_embeddings": False},
        rewritten=("mlp.down_proj.weight", ROTARY[0], "self_attn.o_proj.weight", ROTARY[1]),
    ),
    "minicpm3-without-factors": Case(
        "minicpm3", "deepseek_v32", FOLDED, {"scale_emb": 1, "scale_depth": None, "dim_model_base": None}, rewritten=ROTARY
    ),
    "identity": Case(
        "deepseek_v3", "deepseek_v32", FOLDED, V3_NO_LATENT, "identity", rewritten=NEW_LATENT, embedding=30.0
    ),
    "identity-halves-as-glm": Case(
        "deepseek_v3-halfsplit", "glm_moe_dsa", FOLDED, V3_NO_LATENT, "identity",
        rewritten=(ROTARY[0], *NEW_LATENT), embedding=30.0,
    ),
    "bias": Case(
        "deepseek_v3", "deepseek_v32", FOLDED, V3_NO_LATENT, "bias",
        rewritten=("self_attn.kv_a_proj_with_mqa.bias", "self_attn.o_proj.bias", NEW_LATENT[0], "self_attn.q_a_proj.bias", *NEW_LATENT[1:]),
    ),
    "bias-halves": Case(
        "deepseek_v3-halfsplit", "deepseek_v32", FOLDED, {**V3_NO_LATENT, "attention_bias": True}, "bias",
        rewritten=("self_attn.kv_a_proj_with_mqa.bias", ROTARY[0], NEW_LATENT[0], "self_attn.q_a_proj.bias", *NEW_LATENT[1:]),
    ),
    "v3-own": Case("deepseek_v3", OWN),
    "v2": Case("deepseek_v2", OWN),
    "v2-lite": Case("deepseek_v2-lite", OWN),
    "mistral4": Case("mistral4", OWN),
    "axk1": Case("axk1", OWN),
}  # fmt: skip
DSA_CLASS = [name for name, case in CASES.items() if case.layout != OWN]


@pytest.fixture
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, type]:
    """(folder, class of transformers) of a case's model, stored in bfloat16."""
    case: Case = CASES[request.param]
    model = build(case.family, **case.options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.model.embed_tokens.weight.data *= case.embedding  # type: ignore[union-attr, operator]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="40KB")  # type: ignore[operator]
    return tmp_path / "dense", type(model)


def layout_of(case: Case, source: Path) -> Layout:
    layout = choose(read_json(source / "config.json"), read_index(source), case.layout, untie=case.untie)
    return layout.settled(case.form) if case.form else layout


def written(case: Case, source: Path, out: Path, indexer: IndexerConfig = INDEXER) -> Path:
    config = read_json(source / "config.json")
    width = config.get("q_lora_rank") or config["hidden_size"]
    weights = {
        f"model.layers.{layer}.self_attn": indexer_weights(indexer, config["hidden_size"], width, layer)
        for layer in (0, 1)
    }
    return write_dsa_checkpoint(
        source, out, weights, indexer, manifest={}, layout=layout_of(case, source), q_width=width
    )


def logits(folder: Path, model_class: Any, length: int, left_over: str = "\0") -> Tensor:
    """By a class of transformers, in float32. left_over: a part of the names that may stay unread."""
    model, info = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    faults = {name for names in info.values() for name in names if left_over not in name}
    assert not faults
    tokens = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: Tensor = model.eval()(tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize(("name", "dense"), [(name, name) for name in DSA_CLASS], indirect=["dense"], ids=DSA_CLASS)
def test_the_dense_model_is_in_it(name: str, dense: tuple[Path, type], tmp_path: Path) -> None:
    import transformers

    (source, model_class), case = dense, CASES[name]
    out = written(case, source, tmp_path / "dsa")
    reference = logits(source, model_class, INDEXER.index_topk)
    found = logits(out, getattr(transformers, LAYOUTS[case.layout].architecture), INDEXER.index_topk)
    assert reference.std() > 0.01
    assert float((found - reference).abs().max()) <= case.limit * float(reference.abs().max())
    derived = read_index_of(out, DERIVED_SHARD)
    first = {it.removeprefix("model.layers.0.") for it in derived if it.startswith("model.layers.0.")}
    assert first == set(case.rewritten)
    layout = read_json(out / "mla2dsa.json")["layout"]
    assert (layout["name"], layout["query_form"]) == (case.layout, case.form or None)
    scaled = [it for it in layout["derived"] if any(step["kind"] == "times" for step in it["steps"])]
    assert all(it["dtype"] == "F32" for it in scaled)


def read_index_of(folder: Path, shard: str) -> set[str]:
    return {name for name, place in read_index(folder).items() if place.file.name == shard}


OWN_CASES = [name for name, case in CASES.items() if case.layout == OWN]


@pytest.mark.parametrize(("name", "dense"), [(name, name) for name in OWN_CASES], indirect=["dense"], ids=OWN_CASES)
def test_own_layout_is_the_dense_model_to_transformers(name: str, dense: tuple[Path, type], tmp_path: Path) -> None:
    source, model_class = dense
    out = written(CASES[name], source, tmp_path / "dsa")
    assert torch.equal(logits(source, model_class, 40), logits(out, model_class, 40, left_over=".indexer."))
    config, made = read_json(source / "config.json"), read_json(out / "config.json")
    sizes = {"index_topk": 48, "index_n_heads": 4, "index_head_dim": 16, "indexer_rope_interleave": False}
    assert made == {**config, **sizes}
    for file in source.glob("*.safetensors"):
        assert os.path.samefile(file, out / file.name)
    assert read_index(out).keys() - read_index(source).keys() == read_index_of(out, INDEXER_SHARD)


@pytest.mark.parametrize(("name", "dense"), [(name, name) for name in CASES], indirect=["dense"], ids=list(CASES))
def test_strip_gives_the_source_back(name: str, dense: tuple[Path, type], tmp_path: Path) -> None:
    source, case = dense[0], CASES[name]
    out = written(case, source, tmp_path / "dsa")
    assert contents(strip(out, tmp_path / "again")) == contents(source)
    made = {place.file.name for n, place in read_index(source).items() if not same_bytes(n, source, out)}
    shards = {file.name for file in source.glob("*.safetensors")}
    linked = {it for it in shards if (out / it).exists() and os.path.samefile(source / it, out / it)}
    assert linked == shards - made  # none is written anew that need not be
    assert (out / ORIGINALS).exists() == bool(made)


def same_bytes(name: str, source: Path, out: Path) -> bool:
    one, two = read_index(source)[name], read_index(out).get(name)
    return (
        two is not None and two.file.name not in (DERIVED_SHARD,) and (one.dtype, one.shape) == (two.dtype, two.shape)
    )


@pytest.mark.parametrize("dense", ["v3-halves"], indirect=True)
def test_scores_are_the_same_in_both_classes(dense: tuple[Path, type], tmp_path: Path) -> None:
    """Above index_topk, where the indexers decide, and their rotary channels lie otherwise."""
    import transformers

    indexer = dataclasses.replace(INDEXER, index_topk=8)
    found = []
    for target in (V32, GLM):
        case = Case("deepseek_v3-halfsplit", target.model_type)
        out = written(case, dense[0], tmp_path / target.model_type, indexer)
        found.append(logits(out, getattr(transformers, target.architecture), 64))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("dense", ["minicpm3"], indirect=True)
def test_strip_sees_a_change(dense: tuple[Path, type], tmp_path: Path) -> None:
    """Of what a shard is restored from: the folded tensors, the originals, the rest of the shard."""
    out = written(CASES["minicpm3"], dense[0], tmp_path / "dsa")
    rest = next(it.name for it in out.glob("model-0*.safetensors") if it.stat().st_nlink == 1)
    for name in (DERIVED_SHARD, ORIGINALS, rest):
        whole = (out / name).read_bytes()
        damaged = bytearray(whole)
        if name == DERIVED_SHARD:
            place = read_index(out)["model.layers.0.self_attn.q_b_proj.weight"]
            damaged[place.offset] ^= 1
        else:
            damaged[-1] ^= 1
        (out / name).write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be restored bit for bit") as error:
            strip(out, tmp_path / "again")
        assert len(str(error.value).splitlines()) == 1
        assert not (tmp_path / "again").exists()
        (out / name).write_bytes(whole)
    assert contents(strip(out, tmp_path / "again")) == contents(dense[0])


MANIFEST_DAMAGE = {
    "rows": ({"blocks": 7}, "has no rotary rows as"),
    "far": ({"offset": 2**40}, "has no rotary rows as"),
    "no-number": ({"blocks": "four"}, "damaged, layout.derived"),
    "negative": ({"offset": -1}, "damaged, layout.derived"),
    "kind": ({"kind": "pickle"}, "damaged, layout.derived"),
    "field": ({"more": 1}, "damaged, layout.derived"),
}


@pytest.mark.parametrize("fault", MANIFEST_DAMAGE)
@pytest.mark.parametrize("dense", ["v3-halves"], indirect=True)
def test_strip_believes_no_manifest(fault: str, dense: tuple[Path, type], tmp_path: Path) -> None:
    change, part = MANIFEST_DAMAGE[fault]
    out = written(CASES["v3-halves"], dense[0], tmp_path / "dsa")
    manifest = read_json(out / "mla2dsa.json")
    manifest["layout"]["derived"][0]["steps"][0] |= change
    (out / "mla2dsa.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=part) as error:
        strip(out, tmp_path / "again")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "again").exists()


# Configs


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("target", LAYOUTS.values(), ids=lambda target: target.model_type)
def test_every_default_that_differs_is_written(family: Any, target: Any) -> None:
    """A field left out of config.json takes the default of the class that reads it: both must agree, or we write it."""
    from transformers import CONFIG_MAPPING

    source, dsa = (
        {f.name: f.default for f in dataclasses.fields(CONFIG_MAPPING[it])}
        for it in (family.model_types[0], target.model_type)
    )
    own = {"model_type", "head_dim"}  # head_dim: all overwrite it
    differing = {name for name in source.keys() & dsa.keys() if source[name] != dsa[name]} - own
    told = {*family.defaults, *family.config, *family.drops}
    if source.get("initializer_range") is None:
        told.add("initializer_range")  # of training
    assert differing <= told
    for name in family.defaults.keys() & source.keys():
        if not callable(family.defaults[name]) and source[name] is not None:
            assert family.defaults[name] == source[name], name


@pytest.mark.parametrize(("model_type", "why"), NO_CLASS.items(), ids=NO_CLASS)
def test_what_no_class_fits(model_type: str, why: str) -> None:
    layout = choose({"model_type": model_type}, {})
    assert (layout.name, layout.target) == (OWN, None)
    assert why in layout.why
    with pytest.raises(UserError, match=f"--layout deepseek_v32: no DSA class fits {model_type}.*--layout own"):
        choose({"model_type": model_type}, {}, "deepseek_v32")


V3 = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("config", "layout", "options", "part"),
    [
        ({"model_type": "nobody"}, OWN, {}, "no rule for model_type nobody"),
        ({"model_type": "kimi_k25", "text_config": V3}, OWN, {}, "is a wrapper"),
        ({**V3, "mlp_bias": True}, OWN, {}, "mlp_bias is true"),
        ({**V3, "q_lora_rank": None}, OWN, {}, "no self_attn.q_proj.weight is stored"),
        (
            {"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense", "sparse", "dense"]},
            OWN,
            {},
            "dense layers after",
        ),
        (V3, "deepseek_v32", {}, "DeepSeek-V3.2 is DeepSeek-V3"),
        ({**V3, "model_type": "kimi_k2"}, "deepseek_v32", {}, "DeepSeek-V3.2 is DeepSeek-V3"),
        (V3, OWN, {"asked": "own"}, "asked for"),
    ],
)
def test_the_layout_that_is_chosen(config: dict[str, Any], layout: str, options: dict[str, Any], part: str) -> None:
    found = choose(config, {}, **options)
    assert found.name == layout
    assert part in found.why


@pytest.mark.parametrize(
    ("config", "options", "part"),
    [
        ({"model_type": "nobody"}, {"asked": "glm_moe_dsa"}, "--layout glm_moe_dsa: no rule for model_type nobody"),
        ({"model_type": "deepseek_v2"}, {"untie": True}, "--untie"),
        ({**V3, "q_lora_rank": None}, {"asked": "deepseek_v32"}, "q_lora_rank is null"),
    ],
)
def test_what_is_asked_for_in_vain(config: dict[str, Any], options: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        choose(config, {}, **options)


@pytest.mark.parametrize(
    ("config", "stored", "mtp", "expected"),
    [
        ({"num_nextn_predict_layers": 1}, 1, "keep", 1),
        ({"num_nextn_predict_layers": 1}, 0, "keep", 0),
        ({"num_nextn_predict_layers": 1}, 0, "drop", 0),
        ({}, 1, "keep", 1),
        ({}, 0, "keep", None),
    ],
)
def test_the_config_counts_the_mtp_layers_that_are_there(
    config: dict[str, Any], stored: int, mtp: str, expected: int | None
) -> None:
    dense = {**V3, **config}
    made = dsa_config(dense, dataclasses.replace(INDEXER, index_head_dim=64), [], choose(dense, {}, mtp=mtp), stored)
    assert made.get("num_nextn_predict_layers") == expected


def test_what_other_runtimes_read_is_told() -> None:
    """vLLM looks up e_score_correction_bias by topk_method; transformers leaves both fields out when it saves."""
    indexer = dataclasses.replace(INDEXER, index_head_dim=64)
    made = dsa_config(V3, indexer, [], choose(V3, {}))
    assert (made["topk_method"], made["scoring_func"]) == ("noaux_tc", "sigmoid")
    given = {**V3, "topk_method": "greedy"}
    assert dsa_config(given, indexer, [], choose(given, {}))["topk_method"] == "greedy"


def test_stored_float32_is_said(tmp_path: Path) -> None:
    """A factor is not rounded into bfloat16."""
    source = tmp_path / "dense"
    build("minicpm3", scale_emb=3.3).to(torch.bfloat16).save_pretrained(source)  # type: ignore[operator]
    case = Case("minicpm3", "deepseek_v32")
    out = written(case, source, tmp_path / "dsa")
    with safe_open(source / "model.safetensors", "pt") as old, safe_open(out / DERIVED_SHARD, "pt") as new:
        name = "model.embed_tokens.weight"
        assert torch.equal(new.get_tensor(name), old.get_tensor(name).float() * 3.3)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
