"""WriteGuard on small attentions: where a write changes what attention reads, and where it does not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from mla2dsa.passes.matching.cores import find_cores
from mla2dsa.passes.matching.sites import Core, NoMatch
from mla2dsa.passes.matching.writes import FUNCTIONALISE, WriteGuard

Step = Callable[[Tensor], object]


def attention(hooks: dict[str, Step]) -> Callable[..., Any]:
    """Two heads of attention on [B, T, 8]; a hook is called with the value of its name, and may write."""

    def hook(name: str, value: Tensor) -> None:
        if name in hooks:
            hooks[name](value)

    def run(x: Tensor, weight: Tensor, scale: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        x = x * 2.0
        hook("hidden", x)
        q, k, v = F.linear(x, weight).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, 1)
        k = k * scale
        hook("product", k)
        seen = k.transpose(2, 3).transpose(2, 3)  # what attention reads: made before the hooks, and not what they get
        hook("k", k)
        hook("scale", scale)
        visible = (mask[:, None, None] > 0).expand(-1, 1, x.shape[1], -1).clone()
        hook("mask", visible)
        out = F.scaled_dot_product_attention(q, seen, v, attn_mask=visible)
        for name, value in (("out", out), ("k after", k), ("mask after", visible), ("hidden after", x)):
            hook(name, value)
        return out, k, x, visible

    return run


def eager(step: Step) -> Callable[..., Any]:
    """The same with its softmax in the open: `step` is called with the scores."""

    def run(x: Tensor, weight: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
        q, k, v = F.linear(x, weight).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, 1)
        scores = (q @ k.mT) * 0.5
        step(scores)
        return scores.softmax(-1) @ v

    return run


def guarded(program: Callable[..., Any]) -> tuple[WriteGuard, Core, list[Node]]:
    inputs = (torch.rand(2, 5, 8), torch.rand(24, 8), torch.ones(4), torch.ones(2, 5))
    with torch.no_grad():
        graph = make_fx(program, pre_dispatch=True)(*inputs).graph
    (core,) = find_cores(graph)
    assert isinstance(core, Core)
    return WriteGuard(graph), core, list(graph.nodes)


WRITES: list[tuple[str, Step]] = [
    ("itself", lambda k: k.mul_(2.0)),
    ("view", lambda k: k[..., 1:].mul_(2.0)),
    ("view of a view", lambda k: k.mT.flatten(0, 1)[1:].unsqueeze(0).fill_(1.0)),
    ("diagonal", lambda k: torch.diagonal(k, 0, -2, -1).zero_()),
    ("as_strided", lambda k: k.as_strided((3,), (1,)).zero_()),
    ("unfold", lambda k: k.unfold(-1, 2, 2).add_(1.0)),
    ("view_as_complex", lambda k: torch.view_as_complex(k.unflatten(-1, (2, 2))).mul_(2.0)),
    ("imag", lambda k: torch.view_as_complex(k.unflatten(-1, (2, 2))).imag.zero_()),
    ("item of unbind", lambda k: k.unbind(-1)[2].fill_(0.0)),
    ("item of split", lambda k: k.split(2, -1)[0].fill_(0.0)),
    ("item of chunk", lambda k: k.chunk(2, -1)[1].exp_()),
    ("detach", lambda k: k.detach().mul_(2.0)),
    ("out=", lambda k: torch.mul(k, 2.0, out=k)),
    ("out= of others", lambda k: torch.add(torch.ones(4), torch.ones(4), out=k[0, 0, 0])),
    ("out= of two", lambda k: torch.max(k.clone(), -1, out=(k[..., 0], torch.empty(2, 2, 5, dtype=torch.long)))),
    ("foreach", lambda k: torch._foreach_add_([k[:, 0], k[:, 1]], 1.0)),
    ("index_put_", lambda k: k.index_put_((torch.tensor([0]),), torch.tensor(1.0))),
    ("scatter_", lambda k: k.scatter_(-1, torch.zeros(1, 1, 1, 1, dtype=torch.long), 2.0)),
    ("set_", lambda k: torch.empty(0).set_(k.detach()).zero_()),
]
ids = [name for name, _ in WRITES]


@pytest.mark.parametrize("step", [step for _, step in WRITES], ids=ids)
def test_a_write_to_the_keys_is_seen_in_another_view_of_them(step: Step) -> None:
    guard, core, _ = guarded(attention({"k": step}))
    with pytest.raises(NoMatch, match=r"^the in-place write \w+ \(aten\.\w+\.\w+\).* reaches the attention: "):
        guard.check(core)


@pytest.mark.parametrize("step", [step for _, step in WRITES], ids=ids)
def test_a_write_after_attention_is_let_be(step: Step) -> None:
    guard, core, nodes = guarded(attention({"k after": step}))
    guard.check(core)
    guard.check_readable([core.q, core.k], at=core.out)
    with pytest.raises(NoMatch):
        guard.check_readable([core.k], at=nodes[-1])


@pytest.mark.parametrize(
    ("name", "step"),
    [("out", lambda out: out.mT.mul_(2.0)),
     ("mask after", lambda mask: mask.fill_(False)), ("hidden after", lambda x: x.add_(1.0)),
     ("k", lambda k: k.clone().mul_(2.0)), ("k", lambda k: k.detach_())],
    ids=["result", "mask-after", "hidden-after", "copy", "detach_"],
)  # fmt: skip
def test_a_write_that_attention_does_not_see_is_let_be(name: str, step: Step) -> None:
    guard, core, _ = guarded(attention({name: step}))
    guard.check(core)


@pytest.mark.parametrize(
    ("name", "step"),
    [("mask", lambda mask: torch.diagonal(mask, 0, -2, -1).index_fill_(-1, torch.tensor([0]), True)),
     ("mask", lambda mask: torch.logical_not(mask, out=mask))],
    ids=["diagonal", "out="],
)  # fmt: skip
def test_a_write_to_the_mask_is_seen(name: str, step: Step) -> None:
    guard, core, _ = guarded(attention({name: step}))
    for _ in range(2):  # what was found is found again for the next layer with the same mask
        with pytest.raises(NoMatch, match=FUNCTIONALISE):
            guard.check(core)


def test_a_write_to_a_weight_matters_from_then_on() -> None:
    guard, core, nodes = guarded(attention({"scale": lambda scale: scale.view(2, 2)[0].mul_(2.0)}))
    weight, scale = nodes[1], nodes[2]
    guard.check(core)  # k was made before
    guard.check_readable([weight], at=core.out)
    with pytest.raises(NoMatch, match=FUNCTIONALISE):
        guard.check_readable([scale], at=core.out)


def test_a_write_within_eager_attention_is_seen() -> None:
    guard, core, _ = guarded(eager(lambda scores: scores[..., :2].mul_(0.0)))
    with pytest.raises(NoMatch, match=FUNCTIONALISE):
        guard.check(core)
    guard, core, _ = guarded(eager(lambda scores: scores[..., :2].mul(0.0)))
    guard.check(core)


def test_the_origin_of_a_value_ends_at_its_projection() -> None:
    guard, core, _ = guarded(attention({"product": lambda k: k.mT.mul_(2.0)}))
    guard.check_origin([core.q])
    with pytest.raises(NoMatch, match="mul_"):
        guard.check_origin([core.k])


def test_a_node_that_writes_is_named() -> None:
    guard, _, nodes = guarded(attention({"k": lambda k: torch.mul(k, 2.0, out=k)}))
    writer = next(node for node in nodes if "out" in str(node.target))
    with pytest.raises(
        NoMatch, match=rf"^the in-place write {writer.name} \(aten.mul.out\) reaches the attention"
    ) as miss:
        guard.check_functional(writer)
    assert miss.value.node is writer
    for node in nodes:
        if node is not writer:
            guard.check_functional(node)


@pytest.mark.parametrize(
    ("step", "op"),
    [(lambda k: torch.einsum("bhtd->bthd", k).mul_(2.0), "aten.einsum.default"),
     (lambda k: F.dropout(k, 0.5, training=False).mul_(2.0), "aten.dropout.default"),
     (lambda k: torch.ops.aten.unsafe_split.Tensor(k, 1)[0].mul_(2.0), "aten.unsafe_split.Tensor"),
     (lambda k: torch.empty(0).set_(k.detach()).zero_(), "aten.set_.source_Tensor")],
    ids=["einsum", "dropout", "unsafe_split", "set_"],
)  # fmt: skip
def test_a_write_that_torch_would_lose_is_not_sent_to_be_functionalised(step: Step, op: str) -> None:
    """Also when there is another one that could be."""
    both: Step = lambda k: (k[..., 0].zero_(), step(k))  # noqa: E731
    for hook in (step, both):
        guard, core, _ = guarded(attention({"k": hook}))
        with pytest.raises(NoMatch, match=rf"\({op}\), which does not say what") as miss:
            guard.check(core)
        assert FUNCTIONALISE not in str(miss.value)
