"""The ops as torch sees them: schema and fake, export with dynamic dims, argument checks, choice of implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_samples import causal, op_samples, randn
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.kernels import cpu, ops

OPS = torch.ops.mla2dsa


@pytest.mark.parametrize("name", op_samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, op_samples()[name])


class _Layer(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, weights: Tensor, begin: Tensor, end: Tensor, kv: Tensor) -> Tensor:
        indices = OPS.lightning_indexer(q, k, weights, begin, end, 4)
        rows = torch.cat((q, q), -1)
        return OPS.sparse_mla(rows, kv, indices, 0.3, 8) + OPS.attention_mass(rows, kv, begin, end, 0.3).amax()


def test_export_keeps_batch_queries_and_slots_dynamic() -> None:
    def inputs(batch: int, queries: int, slots: int) -> tuple[Tensor, ...]:
        ragged = causal(batch, queries, past=slots - queries)
        return (
            randn(batch, queries, 2, 8),
            randn(batch, slots, 8),
            randn(batch, queries, 2),
            *ragged,
            randn(batch, slots, 16),
        )

    b, t, s = (torch.export.Dim(name) for name in ("batch", "queries", "slots"))
    dims = ({0: b, 1: t}, {0: b, 1: s}, {0: b, 1: t}, {0: b, 1: t}, {0: b, 1: t}, {0: b, 1: s})
    program = torch.export.export(_Layer(), inputs(2, 5, 9), dynamic_shapes=dims)
    assert len(program.range_constraints) == 3
    for sizes in [(1, 1, 2), (3, 7, 40), (2, 12, 12)]:
        assert torch.equal(program.module()(*inputs(*sizes)), _Layer()(*inputs(*sizes)))


def replaced(name: str, position: int, value: Any) -> tuple[Any, ...]:
    args = op_samples()[name]
    return (*args[:position], value, *args[position + 1 :])


BAD = [
    ("lightning_indexer", 0, torch.ones(2, 5, 12), "q must have 4 dims"),
    ("lightning_indexer", 0, torch.ones(2, 5, 3, 12, dtype=torch.int32), "q is torch.int32"),
    ("lightning_indexer", 1, torch.ones(2, 9, 11), "k has shape .2, 9, 11., its dim 2 must be 12"),
    ("lightning_indexer", 1, torch.ones(3, 9, 12), "k has shape"),
    ("lightning_indexer", 1, torch.ones(2, 9, 12).double(), "k is torch.float64, expected torch.float32"),
    ("lightning_indexer", 2, torch.ones(2, 5, 4), "weights has shape"),
    ("lightning_indexer", 3, torch.ones(2, 4, dtype=torch.int32), "key_begin has shape"),
    ("lightning_indexer", 4, torch.ones(2, 5), "key_end is torch.float32"),
    ("lightning_indexer", 4, torch.ones(2, 5, dtype=torch.int32, device="meta"), "key_end is on meta, expected cpu"),
    ("lightning_indexer", 5, 0, "topk must be positive, got 0"),
    ("sparse_mla", 1, torch.ones(2, 9, 13), "kv has shape"),
    ("sparse_mla", 2, torch.ones(2, 5, 4, dtype=torch.int64), "indices is torch.int64, expected one of torch.int32"),
    ("sparse_mla", 2, torch.ones(2, 6, 4, dtype=torch.int32), "indices has shape"),
    ("sparse_mla", 4, 13, "kv_lora_rank is 13, but a row of kv has only 12"),
    ("sparse_mla", 4, 0, "kv_lora_rank must be positive"),
    ("attention_mass", 1, torch.ones(1, 9, 12), "kv has shape"),
    ("attention_mass", 2, torch.ones(2, 5, 1, dtype=torch.int32), "key_begin must have 2 dims"),
    ("dense_attention", 1, torch.ones(2, 3, 8, 12), "v has shape .2, 3, 9, 8., its dim 2 must be 8"),
    ("dense_attention", 1, torch.ones(2, 1, 9, 12), "k has shape"),
    ("dense_attention", 3, None, "mask is None .causal., which needs as many queries as keys, got 5 and 9"),
    ("dense_attention", 3, torch.ones(2, 1, 5, 8, dtype=torch.bool), "mask has shape"),
    ("dense_attention", 3, torch.ones(2, 2, 5, 9, dtype=torch.bool), "mask has shape"),
    ("dense_attention", 3, torch.ones(2, 1, 5, 9, dtype=torch.int32), "mask is torch.int32"),
    ("moe_experts", 1, torch.ones(7, 2), "top_k_index is torch.float32"),
    ("moe_experts", 2, torch.ones(7, 3), "top_k_weights has shape"),
    ("moe_experts", 3, torch.ones(3, 9, 6).double(), "gate_up_proj .3, 9, 6. must hold twice the 4 channels"),
    ("moe_experts", 4, torch.ones(2, 6, 4).double(), "down_proj has shape"),
    ("moe_experts", 5, "swish", "activation 'swish' is not known, expected one of silu, gelu"),
]


@pytest.mark.parametrize(("name", "position", "value", "message"), BAD, ids=[f"{n}-{p}-{m[:24]}" for n, p, _, m in BAD])
def test_bad_argument_is_named(name: str, position: int, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(OPS, name)(*replaced(name, position, value))


def test_environment_forces_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "sparse_mla", lambda *_: pytest.fail("the CPU path ran"))
    monkeypatch.setenv(ops.KERNELS_ENV, "reference")
    assert OPS.sparse_mla(*op_samples()["sparse_mla"]).shape == (2, 5, 3, 8)
    monkeypatch.setenv(ops.KERNELS_ENV, "refrence")
    with pytest.raises(UserError, match="MLA2DSA_KERNELS=refrence is not known"):
        OPS.sparse_mla(*op_samples()["sparse_mla"])
