"""find_cores: what is read off an attention, computed again by the formula, gives what the program gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_programs import inputs_of, node_of, op_name, outputs_of, program_of
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from mla2dsa.kernels import ops  # noqa: F401  (registers torch.ops.mla2dsa)
from mla2dsa.passes.graph.graph_eval import evaluate, value
from mla2dsa.passes.matching.cores import find_cores
from mla2dsa.passes.matching.sites import Core

HEADS, WIDTH = 3, 4
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Any]  # q, k, v [B, H, T, d], visible [B, 1, T, T] bool


def inputs(batch: int = 2, tokens: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(batch, HEADS, tokens, WIDTH, generator=g) for _ in range(3))
    visible = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool).tril()
    visible[0, ..., :1] = tokens == 1
    visible |= torch.eye(tokens, dtype=torch.bool)
    return q, k, v, visible


def program_with_dynamic_tokens(attention: Attention) -> ExportedProgram:
    """Batch and tokens are dynamic; heads and channels are not."""
    batch, tokens = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC

    class Lines(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Any:
            return attention(q, k, v, visible)

    rows = {0: batch, 2: tokens}
    shapes = (rows, rows, rows, {0: batch, 2: tokens, 3: tokens})
    with torch.no_grad():
        return torch.export.export(Lines(), inputs(), dynamic_shapes=shapes, strict=False)


def by_the_formula(core: Core, program: ExportedProgram, given: tuple[Tensor, ...]) -> Tensor:
    """softmax(scale q k^T, masked) v of what the core's fields name."""
    nodes = inputs_of(program)
    feed = {node: x.double() if x.is_floating_point() else x for node, x in zip(nodes, given, strict=True)}
    env = {
        size.node.expr: number
        for node, tensor in feed.items()
        for size, number in zip(value(node).shape, tensor.shape, strict=True)
        if isinstance(size, torch.SymInt)
    }
    wanted = [core.q, core.k, core.v, *([core.mask] if core.mask is not None else [])]
    q, k, v, *mask = evaluate(wanted, feed, env)
    scores = core.scale * q @ k.mT
    if core.is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    for m in mask:
        hidden = (m if core.mask_hides else ~m) if m.dtype == torch.bool else None
        scores = scores + m if hidden is None else scores.masked_fill(hidden, float("-inf"))
    result: Tensor = torch.softmax(scores, -1) @ v
    return result


def added(visible: Tensor, like: Tensor) -> Tensor:
    return torch.where(visible, 0.0, float("-inf")).to(like.dtype)


def sdpa(**options: Any) -> Attention:
    return lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, **options)


READ: dict[str, tuple[str, Attention]] = {
    "sdpa": ("sdpa", sdpa()),
    "sdpa with a scale": ("sdpa", sdpa(scale=0.3)),
    "sdpa with a scale of 0": ("sdpa", sdpa(scale=0.0)),
    "sdpa that is causal": ("sdpa", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "sdpa with an additive mask": ("sdpa", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, added(m, q))),
    "anchor": ("anchor", lambda q, k, v, m: torch.ops.mla2dsa.dense_attention(q, k, v, m, 0.3)),
    "anchor that is causal": ("anchor", lambda q, k, v, m: torch.ops.mla2dsa.dense_attention(q, k, v, None, 0.3)),
    "eager": ("eager", lambda q, k, v, m: torch.softmax(q @ k.mT * 0.3 + added(m, q), -1) @ v),
    "divided": ("eager", lambda q, k, v, m: torch.softmax(q @ k.mT / 2.0 / 1.5 + added(m, q), -1) @ v),
    "scaled twice": ("eager", lambda q, k, v, m: torch.softmax((q @ k.mT * 2 / 5) + added(m, q), -1) @ v),
    "scaled query": ("eager", lambda q, k, v, m: torch.softmax((q * 0.3) @ k.mT + added(m, q), -1) @ v),
    "no mask": ("eager", lambda q, k, v, m: torch.softmax(q @ k.mT, -1) @ v),
    "transposed": ("eager", lambda q, k, v, m: torch.softmax(q @ k.transpose(-1, -2) + added(m, q), -1) @ v),
    "transposed from the front": ("eager", lambda q, k, v, m: torch.softmax(q @ k.transpose(3, 2), -1) @ v),
    "permuted": ("eager", lambda q, k, v, m: torch.softmax(q @ k.permute(0, 1, 3, 2), 3) @ v),
    "filled": ("eager", lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(~m, float("-inf")), -1) @ v),
    "filled with much": ("eager", lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(~m, -1e30), -1) @ v),
    "chosen": ("eager", lambda q, k, v, m: torch.softmax(torch.where(m, q @ k.mT, float("-inf")), -1) @ v),
    "chosen against": ("eager", lambda q, k, v, m: torch.softmax(torch.where(~m, -1e30, q @ k.mT), -1) @ v),
    "chosen from a tensor": (
        "eager", lambda q, k, v, m: torch.softmax(torch.where(m, q @ k.mT, torch.full((), -1e30)), -1) @ v,
    ),
    "cast up and down": (
        "eager",
        lambda q, k, v, m: torch.softmax((q.half() @ k.half().mT).float() + added(m, q), -1, dtype=torch.float32).half() @ v.half(),
    ),
    "dropout in eval": (
        "eager", lambda q, k, v, m: F.dropout(torch.softmax(q @ k.mT, -1), 0.5, training=False).clone() @ v,
    ),
    "dropout of nothing": ("eager", lambda q, k, v, m: torch.dropout(torch.softmax(q @ k.mT, -1), 0.0, True) @ v),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_an_attention_is_read(name: str) -> None:
    kind, attention = READ[name]
    program = program_with_dynamic_tokens(attention)
    (core,) = find_cores(program.graph)
    assert isinstance(core, Core), core
    assert (core.kind, core.out) == (kind, outputs_of(program)[0])
    for shape in [(2, 5), (1, 1), (3, 8)]:
        given = inputs(*shape)
        expected = attention(*given).double()
        tolerance = 1e-5 if attention(*inputs()).dtype == torch.float32 else 3e-3
        torch.testing.assert_close(by_the_formula(core, program, given), expected, rtol=0, atol=tolerance)


def test_two_attentions_come_in_graph_order() -> None:
    program = program_with_dynamic_tokens(
        lambda q, k, v, m: F.scaled_dot_product_attention(torch.softmax(q @ k.mT, -1) @ v, k, v)
    )
    first, second = find_cores(program.graph)
    assert isinstance(first, Core)
    assert isinstance(second, Core)
    assert (first.kind, second.kind, second.q) == ("eager", "sdpa", first.out)


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (lambda q, k, v, m: torch.softmax(q, -1), 0),  # over channels, tokens before: a gate
        (lambda q, k, v, m: torch.softmax(q.sum(1), -1), 0),  # a router's
        (lambda q, k, v, m: torch.softmax(q.sum((1, 3)), -1), 0),  # of two axes: logits over a batch's tokens
        (lambda q, k, v, m: torch.softmax(q[:, 0] @ k[:, 0].mT, -1) @ v[:, 0], 1),
    ],
    ids=["channels", "router", "two axes", "one head"],
)
def test_a_softmax_over_tokens_is_attention_and_others_are_not(lines: Attention, count: int) -> None:
    assert len(find_cores(program_with_dynamic_tokens(lines).graph)) == count


def test_a_static_softmax_of_four_axes_counts() -> None:
    """Nothing but the rank tells attention from a router there, and an attention must not be overlooked."""
    program = program_of(READ["eager"][1], *inputs(), dynamic=None)
    (core,) = find_cores(program.graph)
    assert isinstance(core, Core)


def in_cond(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    result: Tensor = torch.cond(
        m.sum() > 3, lambda q, k, v: (torch.softmax(q @ k.mT, -1) @ v).clone(), lambda q, k, v: v.clone(), (q, k, v)
    )
    return result


P = "attention scores "
REFUSED: dict[str, tuple[Attention, str, str]] = {  # attention, reason, op of the node to blame
    "sdpa with dropout": (sdpa(dropout_p=0.1), "attention dropout is on: export the model in eval mode", "scaled_dot_product_attention"),
    "over queries": (lambda q, k, v, m: torch.softmax(q @ k.mT, 2) @ v, "softmax is not over the keys", "softmax"),
    "dropout": (
        lambda q, k, v, m: torch.dropout(torch.softmax(q @ k.mT, -1), 0.1, True) @ v,
        "attention dropout is on: export the model in eval mode", "dropout",
    ),
    "probabilities read": (
        lambda q, k, v, m: (p := torch.softmax(q @ k.mT, -1)) @ v + p.sum(),
        "the attention probabilities have another reader than the sum over values", "softmax",
    ),
    "probabilities returned": (
        lambda q, k, v, m: ((p := torch.softmax(q @ k.mT, -1)) @ v, p),
        "the attention probabilities have another reader than the sum over values", "softmax",
    ),
    "probabilities on the right": (
        lambda q, k, v, m: v.mT @ torch.softmax(q @ k.mT, -1),
        "softmax over tokens is followed by aten.matmul.default, not by a matmul with values", "matmul",
    ),
    "squared": (
        lambda q, k, v, m: torch.softmax(q @ k.mT, -1).square() @ v,
        "softmax over tokens is followed by aten.square.default, not by a matmul with values", "square",
    ),
    "no product": (
        lambda q, k, v, m: torch.softmax(m.float(), -1) @ v,
        "softmax over tokens does not come from a product of queries and keys", "to",
    ),
    "capped": (
        lambda q, k, v, m: torch.softmax(torch.tanh(q @ k.mT), -1) @ v,
        P + "pass through aten.tanh.default, which this pass does not read", "tanh",
    ),
    "divided by nothing": (
        lambda q, k, v, m: torch.softmax(q @ k.mT / 0.0, -1) @ v,
        P + "pass through aten.div.Tensor, which this pass does not read", "div",
    ),
    "scaled by a tensor": (
        lambda q, k, v, m: torch.softmax(q @ k.mT * q.sum(), -1) @ v,
        P + "pass through aten.mul.Tensor, which this pass does not read", "mul",
    ),
    "shifted": (
        lambda q, k, v, m: torch.softmax(q @ k.mT + 0.5, -1) @ v,
        P + "pass through aten.add.Tensor, which this pass does not read", "add",
    ),
    "half a mask": (
        lambda q, k, v, m: torch.softmax(torch.add(q @ k.mT, added(m, q), alpha=0.5), -1) @ v,
        P + "pass through aten.add.Tensor, which this pass does not read", "add",
    ),
    "two masks": (
        lambda q, k, v, m: torch.softmax((q @ k.mT + added(m, q)).masked_fill(~m, -1e9), -1) @ v,
        P + "pass through aten.add.Tensor, which this pass does not read", "add",
    ),
    "weakly filled": (
        lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(~m, -100.0), -1) @ v,
        P + "pass through aten.masked_fill.Scalar, which this pass does not read", "masked_fill",
    ),
    "chosen from a bias": (
        lambda q, k, v, m: torch.softmax(torch.where(m, q @ k.mT, torch.full((), -5.0)), -1) @ v,
        P + "pass through aten.where.self, which this pass does not read", "where",
    ),
    "scaled after the mask": (
        lambda q, k, v, m: torch.softmax((q @ k.mT + added(m, q)) * 2, -1) @ v,
        P + "are scaled after the mask", "add",
    ),
    "keys not transposed": (
        lambda q, k, v, m: torch.softmax(q @ k.reshape(k.shape[0], HEADS, WIDTH, -1), -1) @ v,
        P + "are not q times k transposed", "matmul",
    ),
    "nothing swapped": (
        lambda q, k, v, m: torch.softmax(q @ k.mT.permute(0, 1, 2, 3), -1) @ v,
        P + "are not q times k transposed", "matmul",
    ),
    "fused": (
        lambda q, k, v, m: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
        "attention op aten._scaled_dot_product_flash_attention_for_cpu.default is not one this pass reads: "
        "export with sdpa or eager attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "in a branch": (in_cond, "attention stands in a nested graph (cond)", "true_graph_0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_why(name: str) -> None:
    attention, reason, op = REFUSED[name]
    program = program_with_dynamic_tokens(attention)
    ((node, why),) = find_cores(program.graph)  # type: ignore[misc]
    assert isinstance(node, Node)
    assert (why, op_name(node)) == (reason, op)


def test_keys_that_are_an_input_already_transposed_are_refused() -> None:
    program = program_of(
        lambda q, k, v: torch.softmax(q @ k, -1) @ v, *(torch.zeros(2, 4, 4) for _ in range(3)), dynamic=None
    )
    assert find_cores(program.graph) == []  # of three static axes: a router's
    program = program_of(
        lambda q, k, v: torch.softmax(q @ k, -1) @ v, *(torch.zeros(2, 3, 4, 4) for _ in range(3)), dynamic=None
    )
    ((node, why),) = find_cores(program.graph)  # type: ignore[misc]
    assert (why, node) == (P + "are not q times k transposed", node_of_scores(program))


def node_of_scores(program: ExportedProgram) -> Any:
    return node_of(program, "softmax").args[0]
