"""DeepSeek-V2, whose router takes a softmax: --target vllm writes it as the class that vLLM alone reads so, and it works here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents
from command_line import Done, mla2dsa, quick_capture  # noqa: F401
from families import build
from saved import captured

from mla2dsa.exporters.dsa.families import base_of
from mla2dsa.exporters.dsa.layout import choose
from mla2dsa.optimizer.export import export
from mla2dsa.optimizer.model.cached_model import open_torch_session
from mla2dsa.optimizer.verify import verify_folders
from mla2dsa.runtime.generation import prefill
from mla2dsa.runtime.ort_session import OrtSession

# vLLM's kernels take no other sizes of the latent, the rotary channels and the indexer. One group of four, so that a choice of
# groups is another one than of experts.
SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "pad_token_id": None, "topk_group": 1}
RECIPE = "index_topk: 64\nindex_n_heads: 32\nindex_head_dim: 128\nsequence_length: 80\ntokens: 240\nrows: 8\n"
QUALITY = re.compile(r"loss increase|KL to|attention mass")
ROUTERS = {"deepseek_v2": ("group_limited_greedy", 4), "deepseek_v2-lite": ("greedy", 1)}
IDS = list(range(3, 90))  # more than index_topk


@dataclass(frozen=True)
class Written:
    """A model and what --target vllm made of it."""

    name: str
    source: Path
    out: Path
    told: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads((self.out / "config.json").read_text())
        return made


def dense(name: str, folder: Path) -> Path:
    """In bfloat16; embeddings so large that the identity is a query latent to 1e-5."""
    model = build(name, **SIZES)
    model.model.embed_tokens.weight.data *= 30  # type: ignore[union-attr, operator]
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    return folder


def converted(source: Path, out: Path, targets: str, *flags: str) -> Done:
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    return mla2dsa("convert", source, out, "--recipe", recipe, "--target", targets, "--skip-verification", *flags)


@pytest.fixture(scope="module", params=ROUTERS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    place = tmp_path_factory.mktemp("v2")
    source = dense(request.param, place / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mla2dsa.optimizer.plan.capture", captured)
        done = converted(source, place / "dsa", "vllm", "--json")
    assert done.code == 0, done.err
    return Written(request.param, source, place / "dsa", done.json()["plan"])


def test_the_fields_are_what_vllm_alone_reads(written: Written) -> None:
    made, (method, groups) = written.config, ROUTERS[written.name]
    assert (made["model_type"], made["architectures"]) == ("deepseek_v32", ["DeepseekV32ForCausalLM"])
    assert (made["scoring_func"], made["topk_method"], made["norm_topk_prob"]) == ("softmax", method, False)
    assert (made["n_group"], made["topk_group"]) == (groups, 1)
    assert made["q_lora_rank"] is not None
    loads = {name: target["loads"] for name, target in written.told["targets"].items()}
    assert [name for name, does in loads.items() if does] == ["vllm"]
    assert "scoring_func is softmax" in written.told["targets"]["transformers"]["because"][0]
    assert "cannot load this" in written.told["layout_reason"]


@pytest.mark.usefixtures("quick_capture")
def test_it_is_the_dense_model(written: Written) -> None:
    """By every check but those of quality, which random weights cannot pass."""
    result = verify_folders(written.source, written.out, sequences=1, sequence_length=80)
    bad = [check for check in result.checks if not check.passed and not QUALITY.search(check.name)]
    assert not bad
    assert "graph = transformers' dense class up to index_topk" in {check.name for check in result.checks}
    assert any("no class with an indexer" in skipped for skipped in result.skipped)
    mla2dsa("strip", written.out, written.out.parent / "again")
    assert contents(written.out.parent / "again") == contents(written.source)


@pytest.mark.parametrize("written", ["deepseek_v2"], indirect=True)
def test_it_is_shown_exported_and_run(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla2dsa.optimizer.model.cached_model.capture", lambda config, dtype: captured(config))
    shown = mla2dsa("inspect", written.out, "--json").json()
    assert shown["attention"] == "DSA"
    assert shown["config"]["scoring_func"] == "softmax"
    assert "cannot load this" in shown["made_by_mla2dsa"]["because"]
    ours = prefill(open_torch_session(written.out, 1, capacity=96), [IDS], len(IDS))
    done = export(written.out, tmp_path / "onnx")
    found = prefill(OrtSession(done.folder, 1, threads=1), [IDS], len(IDS))
    assert (found - ours).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize(
    ("targets", "name"), [((), "own"), (("vllm",), "deepseek_v32"), (("vllm", "transformers"), "own")]
)
def test_it_is_written_for_vllm_alone(targets: tuple[str, ...], name: str) -> None:
    layout = choose({"model_type": "deepseek_v2"}, {}, targets=targets)
    assert (layout.name, layout.in_transformers) == (name, None)
    assert ("--target vllm writes" in layout.why) is (name == "own")


@pytest.mark.parametrize(
    ("router", "base"),
    [
        (("softmax", "greedy"), "deepseek_v2"),
        (("softmax", "noaux_tc"), "deepseek_v3"),
        (("sigmoid", "noaux_tc"), "deepseek_v3"),
        ((None, None), "deepseek_v3"),
    ],
)
def test_the_base_goes_by_the_router(router: tuple[str | None, str | None], base: str) -> None:
    assert base_of(dict(zip(("scoring_func", "topk_method"), router, strict=True)))[0] == base


def test_who_does_not_load_it_is_refused_before_work(tmp_path: Path) -> None:
    done = converted(dense("deepseek_v2", tmp_path / "dense"), tmp_path / "out", "vllm,transformers")
    assert done.code == 1
    assert "ignores the indexers" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick_capture")
def test_a_query_latent_that_is_too_far_off_is_refused(tmp_path: Path) -> None:
    """Biases, the exact form, are read by transformers alone."""
    build("deepseek_v2-lite", **SIZES).to(torch.bfloat16).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    done = converted(tmp_path / "dense", tmp_path / "out", "vllm")
    assert done.code == 1
    assert len(done.err.strip().splitlines()) == 1
    assert "5e-06 is allowed, and biases are not read there" in done.err
    assert not (tmp_path / "out").exists()
