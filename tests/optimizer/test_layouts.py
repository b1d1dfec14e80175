"""What is written in any layout runs: our graph in torch and in onnxruntime against transformers' dense model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_config
from command_line import captured_once  # noqa: F401  (a fixture)
from families import build, indexer_weights
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.exporters.dsa.checkpoint import write_dsa_checkpoint
from mla2dsa.exporters.dsa.families import OWN
from mla2dsa.exporters.dsa.layout import choose
from mla2dsa.files.json_files import read_json
from mla2dsa.files.safetensors_index import read_index
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.export import export
from mla2dsa.optimizer.inspect import inspect
from mla2dsa.optimizer.model.cached_model import dense_config, open_torch_session
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.proof.pair import open_pair
from mla2dsa.runtime.generation import Session, prefill
from mla2dsa.runtime.ort_session import OrtSession

pytestmark = pytest.mark.usefixtures("captured_once")
INDEXER = IndexerConfig(index_topk=48, index_n_heads=4, index_head_dim=16)
IDS = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    family: str
    layout: str = OWN
    form: str = ""
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "v2": Case("deepseek_v2"),  # complex rotary tables
    "v2-lite": Case("deepseek_v2-lite"),
    "mistral4": Case("mistral4"),  # stacked experts
    "v3-as-glm": Case("deepseek_v3", "glm_moe_dsa"),
    "halves": Case("deepseek_v3-halfsplit", "deepseek_v32"),
    "bias-form": Case("deepseek_v3", "deepseek_v32", "bias", {"q_lora_rank": None}),
    "minicpm3": Case("minicpm3", "deepseek_v32"),
}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """(dense folder, DSA folder, logits of the last token by the dense model) of a case."""
    case: Case = CASES[request.param]
    model = build(case.family, **case.options)
    source = tmp_path / "dense"
    model.save_pretrained(source)  # type: ignore[operator]
    config = read_json(source / "config.json")
    layout = choose(config, read_index(source), case.layout)
    width = config.get("q_lora_rank") or config["hidden_size"]
    weights = {
        f"model.layers.{layer}.self_attn": indexer_weights(INDEXER, config["hidden_size"], width, layer)
        for layer in range(2)
    }
    out = write_dsa_checkpoint(
        source, tmp_path / "dsa", weights, INDEXER, manifest={}, q_width=width,
        layout=layout.settled(case.form) if case.form else layout, dtype=torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        return source, out, model(IDS, use_cache=False).logits[:, -1]


def ours(session: Session) -> Tensor:
    return prefill(session, [IDS[0].tolist()], IDS.shape[1])


@pytest.mark.parametrize("made", CASES, indirect=True)
def test_it_runs_in_torch_and_in_onnxruntime(made: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    _, out, expected = made
    scale = float(expected.abs().max())
    assert float((ours(open_torch_session(out, 1)) - expected).abs().max()) < 1e-4 * scale
    done = export(out, tmp_path / "onnx")
    assert float((ours(OrtSession(done.folder, 1, threads=1)) - expected).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize("made", ["v2", "bias-form"], indirect=True)
def test_inspect_says_how_it_is_written(made: tuple[Path, Path, Tensor]) -> None:
    found = inspect(made[1])
    about = found["made_by_mla2dsa"]
    own = about["layout"] == OWN
    assert found["attention"] == "DSA"
    assert (about["query_form"], about["folded_tensors"] > 0) == ((None, False) if own else ("bias", True))
    assert about["because"] == read_json(made[1] / "mla2dsa.json")["layout"]["why"]


@pytest.mark.parametrize("made", ["v2", "v3-as-glm", "bias-form", "minicpm3"], indirect=True)
def test_a_pair_is_opened(made: tuple[Path, Path, Tensor]) -> None:
    source, out, _ = made
    pair = open_pair(source, out)
    assert pair.layout.name == read_json(out / "mla2dsa.json")["layout"]["name"]
    assert [name for name, _, _ in pair.layers] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert pair.folded == bool(read_json(out / "mla2dsa.json")["layout"]["derived"])
    assert (pair.dense.capture is pair.sparse.capture) == (pair.layout.name == OWN or not pair.folded)


@pytest.mark.parametrize("made", ["v2"], indirect=True)
def test_a_hybrid_is_not_run(made: tuple[Path, Path, Tensor]) -> None:
    """A layer without an indexer would forget what came before."""
    edit_config(made[1], {"num_hidden_layers": 3})
    with pytest.raises(UserError, match="layers 2 are linear attention"):
        open_torch_session(made[1], 1)


@pytest.mark.parametrize("made", ["v2"], indirect=True)
def test_own_config_is_the_dense_one(made: tuple[Path, Path, Tensor]) -> None:
    source, out, _ = made
    assert dense_config(Checkpoint.open(out)) == read_json(source / "config.json")


@pytest.mark.parametrize(
    ("made", "change", "parts"),
    [
        ("v2", {"model_type": "deepseek_v32"}, ("model_type 'deepseek_v32'", "mla2dsa.json says own")),
        ("v3-as-glm", {"model_type": "deepseek_v32"}, ("model_type 'deepseek_v32'", "says glm_moe_dsa")),
        ("v3-as-glm", {"indexer_rope_interleave": False}, ("indexer_rope_interleave is false", "in pairs", "to true")),
        ("v2", {"index_topk": 0}, ("index_topk is 0",)),
    ],
    indirect=["made"],
)
def test_edits_that_contradict(made: tuple[Path, Path, Tensor], change: dict[str, Any], parts: tuple[str, ...]) -> None:
    edit_config(made[1], change)
    with pytest.raises(UserError) as error:
        open_torch_session(made[1], 1)
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("made", "change", "part"),
    [
        ("v2", {"routed_scaling_factor": 3.0}, "routed_scaling_factor other than in"),
        ("minicpm3", {"rms_norm_eps": 1e-4}, "rms_norm_eps other than in"),
        ("bias-form", {"attention_bias": False}, "attention_bias other than in"),
    ],
    indirect=["made"],
)
def test_a_pair_says_what_differs(made: tuple[Path, Path, Tensor], change: dict[str, Any], part: str) -> None:
    edit_config(made[1], change)
    with pytest.raises(UserError, match=part):
        open_pair(made[0], made[1])
