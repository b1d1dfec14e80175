"""What other runtimes ask of a DSA checkpoint: told for every model, binding with --target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from checkpoints import dense_checkpoint
from command_line import mla2dsa
from places import ROOT

from mla2dsa.exporters.dsa.layout import Layout, choose
from mla2dsa.exporters.dsa.targets import NAMES, TARGETS, Facts, facts_of, for_targets, page, verdicts
from mla2dsa.optimizer.before.binding import Written, has_chat_template
from mla2dsa.optimizer.plan import prepare
from mla2dsa.optimizer.recipe import Recipe

SIZES = Written(2048, 64, 128)
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 3, "n_routed_experts": 256,
      "kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1536, "num_hidden_layers": 61}  # fmt: skip


def reasons(name: str, facts: Facts) -> str:
    return "; ".join(verdicts(facts, [name])[0].because)


def test_the_page_is_the_data() -> None:
    assert (ROOT / "docs" / "targets.md").read_text() == page()
    assert get_args(get_args(Recipe.model_fields["target"].annotation)[0]) == NAMES


def test_deepseek_v3_loads_everywhere_but_in_llama_cpp() -> None:
    found = verdicts(facts_of(V3, choose(V3, {}), SIZES))
    assert [one.target for one in found if not one.loads] == ["llama.cpp"]
    assert [one.target for one in found] == list(NAMES)
    assert "--tokenizer-mode hf" in found[1].start


@pytest.mark.parametrize(
    ("name", "fields", "sizes", "said"),
    [
        ("vllm", {"tie_word_embeddings": True}, SIZES, "lm_head is tied"),
        ("mlx-lm", {"tie_word_embeddings": True}, SIZES, "lm_head is tied"),
        ("vllm", {"attention_bias": True}, SIZES, "attention_bias"),
        ("vllm", {"rope_scaling": {"type": "longrope"}}, SIZES, "reads any other as yarn"),
        ("vllm", {"topk_method": "greedy"}, SIZES, "topk_method is greedy"),
        ("vllm", {"kv_lora_rank": 256}, SIZES, "kv_lora_rank is 256"),
        ("sglang", {}, Written(2048, 16, 128), "index_n_heads is 16"),
        ("sglang", {}, Written(2048, 64, 64), "index_head_dim is 64"),
        ("vllm", {}, Written(2000, 64, 128), "index_topk is 2000"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_reason_names_the_field(name: str, fields: dict[str, Any], sizes: Written, said: str) -> None:
    config = {**V3, **fields}
    assert said in reasons(name, facts_of(config, choose(config, {}), sizes))
    assert reasons("transformers", facts_of(config, choose(config, {}), sizes)) == ""


@pytest.mark.parametrize(("method", "loads"), [("fp8", False), ("compressed-tensors", True), (None, True)])
def test_a_query_latent_is_not_made_beside_fp8_for_vllm(method: str | None, loads: bool) -> None:
    """It fuses q_a_proj with kv_a_proj_with_mqa, and raises where one is quantised and the other is not."""
    config = {**V3, "q_lora_rank": None, **({"quantization_config": {"quant_method": method}} if method else {})}
    layout = replace(choose(V3, {}), forms=("identity",))
    (found,) = verdicts(facts_of(config, layout, SIZES), ["vllm"])
    assert (found.loads, "fuses the two" in str(found)) == (loads, not loads)


@pytest.mark.parametrize("name", NAMES)
def test_the_own_layout_loads_nowhere_for_one_reason(name: str) -> None:
    (found,) = verdicts(facts_of(V3, Layout("own", "asked for"), SIZES), [name])
    assert not found.loads
    assert len(found.because) == 1


def test_what_does_not_hinder_loading_is_a_note() -> None:
    (found,) = verdicts(facts_of(V3, choose(V3, {}), SIZES, mtp_layers=1, chat_template=True), ["vllm"])
    assert found.loads
    assert [note.split()[0] for note in found.notes] == ["the", "without"]


@pytest.mark.parametrize(
    ("target", "tied", "untied"), [("vllm", True, True), ("sglang", True, False), ("vllm", False, False)]
)
def test_lm_head_is_written_out_for_who_does_not_tie(target: str, tied: bool, untied: bool) -> None:
    config = {**V3, "tie_word_embeddings": tied}
    layout = for_targets(choose(config, {}), config, [target])
    assert layout.untie is untied
    assert not verdicts(facts_of(config, layout, SIZES), [target])[0].because


def test_every_requirement_is_asked_by_a_condition_that_can_fail_and_hold() -> None:
    good = facts_of(V3, choose(V3, {}), SIZES)
    bad = Facts({"attention_bias": True, "scoring_func": "softmax", "tie_word_embeddings": True, "n_routed_experts": 1,
                 "num_hidden_layers": 1, "index_topk": 1, "num_nextn_predict_layers": 1, "indexer_types": ["full", "shared"],
                 "rope_scaling": {"type": "longrope"}, "quantization_config": {"quant_method": "fp8"}}, "own", "identity",
                chat_template=True)  # fmt: skip
    for target in TARGETS[:-1]:
        for one in target.requirements:
            assert one.met(good), (target.name, one.asks)
            assert not one.met(bad), (target.name, one.asks)


@pytest.mark.parametrize(
    ("file", "text", "has"),
    [("chat_template.jinja", "x", True), ("tokenizer_config.json", '{"chat_template": "x"}', True),
     ("tokenizer_config.json", "{}", False), ("tokenizer_config.json", "{", False), ("other", "", False)],
)  # fmt: skip
def test_a_chat_template_is_found(tmp_path: Path, file: str, text: str, has: bool) -> None:
    (tmp_path / file).write_text(text)
    assert has_chat_template(tmp_path) is has


def test_plan_tells_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = Recipe(index_topk=16, index_n_heads=4, index_head_dim=32)
    told = prepare(str(dense_checkpoint("single", tmp_path_factory)), recipe).plan.to_json()["targets"]
    assert list(told) == list(NAMES)
    assert told["transformers"]["loads"]
    assert "index_head_dim is 32, expected 128" in told["vllm"]["because"]


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_a_target_that_would_not_load_is_refused_before_work(
    command: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, out = dense_checkpoint("single", tmp_path_factory), [str(tmp_path / "out")] if command == "convert" else []
    done = mla2dsa(command, str(model), *out, "--target", "vllm,sglang,transformers", "--index-topk", "16")
    assert (done.code, done.out) == (1, "")
    first, vllm, sglang = done.err.splitlines()
    assert "2 things to mend" in first
    assert "--target vllm (0.33): does not, because" in vllm
    assert "index_n_heads is 4" in sglang
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_is_a_usage_error() -> None:
    done = mla2dsa("plan", "no-such-folder", "--target", "vllm,nothing")
    assert done.code == 2
    assert "'nothing'" in done.err
    assert "llama.cpp" in done.err
