"""Which way of making a query latent is taken: by what the identity is off on the model's own hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build

from mla2dsa.errors import UserError
from mla2dsa.exporters.dsa.layout import Layout, choose
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.indexer.query_form import IDENTITY_LIMIT, identity_error, settle
from mla2dsa.optimizer.model.capture import capture
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.model.weights import WeightSource
from mla2dsa.optimizer.verify import FOLDED_TOLERANCE, GRAPH_TOLERANCE

INDEXER = IndexerConfig(index_topk=8, index_n_heads=4, index_head_dim=16)
IDS = torch.randint(3, 128, (24,), generator=torch.Generator().manual_seed(1))


def opened(folder: Path, embedding: float) -> tuple[Layout, WeightSource]:
    """A model without query latent whose embeddings are so large."""
    model = build("deepseek_v3", q_lora_rank=None)
    model.model.embed_tokens.weight.data *= embedding  # type: ignore[union-attr, operator]
    model.save_pretrained(folder)  # type: ignore[operator]
    checkpoint = Checkpoint.open(folder)
    layout = choose(checkpoint.config, checkpoint.tensors)
    return layout, WeightSource(checkpoint, capture(checkpoint.config))


@pytest.mark.parametrize(("embedding", "form"), [(100.0, "identity"), (0.1, "bias")], ids=["large", "small"])
def test_the_real_weights_decide(embedding: float, form: str, tmp_path: Path) -> None:
    layout, source = opened(tmp_path / "m", embedding)
    assert layout.forms == ("identity", "bias")
    settled = settle(layout, source, IDS, INDEXER, "auto")
    assert (settled.name, settled.forms) == ("deepseek_v32", (form,))
    assert ("model.layers.0.self_attn" in settled.why) == (form == "bias")


def test_what_is_left_where_only_the_identity_could_be_made(tmp_path: Path) -> None:
    layout, source = opened(tmp_path / "m", 0.1)
    only = layout.settled("identity")
    settled = settle(only, source, IDS, INDEXER, "auto")
    assert (settled.name, settled.target, settled.forms) == ("own", None, ())
    assert "5e-06 is allowed" in settled.why
    with pytest.raises(UserError, match=r"--layout deepseek_v32: the identity as query latent .*--layout own"):
        settle(only, source, IDS, INDEXER, "deepseek_v32")


@pytest.mark.parametrize("rms", [3.0, 0.1])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_the_error_is_what_the_norms_do(rms: float, eps: float) -> None:
    """The query of the identity form against the query itself, both norms run as the class runs them."""
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(40, 64, generator=generator, dtype=torch.float64) * rms
    gain = torch.rand(64, generator=generator, dtype=torch.float64) + 0.5

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

    hidden = norm(residual, gain)
    latent = norm(hidden / gain, gain)
    measured = float(((latent - hidden).norm(dim=-1) / hidden.norm(dim=-1)).max())
    assert identity_error(hidden, gain, eps) == pytest.approx(measured, rel=1e-6)
    assert (measured > IDENTITY_LIMIT) == (rms == 0.1)


def test_what_the_identity_may_be_off_leaves_the_verification_room() -> None:
    """Softmax makes more of it: 1.4 times with random weights like Moonlight's, which the verification refused at 7.4e-6."""
    assert min(GRAPH_TOLERANCE, FOLDED_TOLERANCE) >= 1.5 * IDENTITY_LIMIT


def test_a_gain_of_zero_is_infinitely_off() -> None:
    assert identity_error(torch.zeros(2, 4), torch.tensor([1.0, 0, 1, 1]), 1e-6) == float("inf")
