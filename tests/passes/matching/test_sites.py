"""The words of the passes: what they say of themselves."""

from __future__ import annotations

import pytest
from torch.fx import Graph

from mla2dsa.passes.matching.sites import Miss, MlaDims, NoMatch


@pytest.mark.parametrize(("q_lora_rank", "width"), [(24, 24), (None, 32)])
def test_the_indexer_reads_the_query_latent_or_the_hidden_state(q_lora_rank: int | None, width: int) -> None:
    dims = MlaDims(
        hidden_size=32, num_heads=4, q_lora_rank=q_lora_rank, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=6,
    )  # fmt: skip
    assert dims.q_width == width


def test_a_miss_names_the_layer_the_reason_and_the_node() -> None:
    assert str(Miss("model.layers.3", 3, "keys mix tokens", "cat_7")) == "model.layers.3: keys mix tokens (node cat_7)"


def test_no_match_carries_the_node_to_blame() -> None:
    node = Graph().placeholder("x")
    assert (str(NoMatch("why", node)), NoMatch("why", node).node, NoMatch("why").node) == ("why", node, None)
