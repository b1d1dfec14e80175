"""Prove that an attention mask is causal & key padding, by evaluating it.

The mask may depend on shapes, constants and integer inputs of the program only. It is run on concrete cases: no padding,
left and right padding, batch 1, and one sequence longer than every number in the mask's arithmetic, so that a sliding
window or a chunk size of any probed length shows itself. Which input is the padding mask is found, not named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from ...compat import torch_private
from ..graph.graph_eval import (
    END,
    CannotEvaluate,
    ancestors,
    carries_tensors,
    concrete,
    evaluate,
    integers,
    is_tensor,
    shape,
    symbols,
    value,
)
from .sites import Core, NoMatch

aten = torch.ops.aten

LONGEST_PROBE = 8192
_FILLS = {
    aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default,
    aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
}  # fmt: skip
_STRETCHING = ("mul", "div", "truediv", "floor_divide", "floordiv", "bitwise_right_shift", "__rshift__", "rshift")
_CURVED = ("pow", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh", "sigmoid", "reciprocal")


@dataclass(frozen=True)
class _Probe:
    batch: int
    length: int
    left: bool = False
    right: bool = False

    def padding(self) -> Tensor:
        """[batch, length] of 1 for real tokens."""
        keep = torch.ones(self.batch, self.length, dtype=torch.long)
        if self.left:
            keep[0, :2] = 0
            keep[-1, :1] = 0
        if self.right:
            keep[-1, -1:] = 0
        return keep


class MaskProver:
    """Judges masks; the verdict is kept per mask node, since all layers usually share one."""

    def __init__(self, user_inputs: Iterable[Node], constants: Mapping[Node, Tensor]) -> None:
        self._inputs = set(user_inputs)
        self._constants = constants
        self._verdicts: dict[tuple[Node, bool], Node | NoMatch | None] = {}

    def padding_input(self, core: Core) -> Node | None:
        """The input that hides padded keys (None when nothing does). Raises NoMatch if the mask is anything else."""
        if core.mask is None:
            if core.is_causal:
                return None
            raise NoMatch("no mask and not causal: bidirectional attention", core.out)
        key = (core.mask, core.mask_hides)
        if key not in self._verdicts:
            try:
                self._verdicts[key] = self._judge(core.mask, core.mask_hides)
            except NoMatch as miss:
                self._verdicts[key] = miss
        verdict = self._verdicts[key]
        if isinstance(verdict, NoMatch):
            raise verdict
        return verdict

    def _judge(self, mask: Node, hides: bool) -> Node | None:
        cone = ancestors(mask, stop=_is_size)
        candidates = self._leaves(cone, mask)
        numbers, longest = _lengths(cone, self._constants)
        if longest > LONGEST_PROBE:
            raise NoMatch(f"the mask's arithmetic reaches {longest:.0f} tokens: too long to probe", mask)
        probes = [_Probe(2, 5), _Probe(3, 6, left=True), _Probe(2, 4, right=True), _Probe(1, 3)]
        probes.append(_Probe(1, max(int(longest), 64) + 5))
        verdict = "it depends on no input"
        for padding in [None, *candidates]:
            failed = self._first_failure(mask, hides, candidates, padding, probes, numbers)
            if failed is None:
                return padding
            verdict = failed
        raise NoMatch(f"the mask is not causal plus key padding: {verdict}", mask)

    def _leaves(self, cone: Iterable[Node], mask: Node) -> list[Node]:
        leaves = [
            n for n in cone if n.op in ("placeholder", "get_attr") and carries_tensors(n) and n not in self._constants
        ]
        for leaf in leaves:
            if leaf not in self._inputs or not is_tensor(leaf) or value(leaf).is_floating_point():
                raise NoMatch(
                    f"the mask depends on activations or weights ({leaf.name}): already sparse, or biased", mask
                )
            if len(shape(leaf)) != 2:
                raise NoMatch(f"the mask depends on input {leaf.name}, which is not [batch, sequence]", mask)
            if _reaches_rotation(leaf):
                raise NoMatch(
                    f"the mask depends on positions ({leaf.name}; packed-sequence detection): export with an attention_mask input",
                    mask,
                )
        return leaves

    def _first_failure(
        self,
        mask: Node,
        hides: bool,
        leaves: list[Node],
        padding: Node | None,
        probes: list[_Probe],
        numbers: list[int],
    ) -> str | None:
        for probe in probes:
            if padding is None and (probe.left or probe.right):
                continue
            try:
                visible = self._visible(mask, hides, leaves, padding, probe, numbers)
            except CannotEvaluate as error:
                return f"it cannot be evaluated ({error})"
            expected = torch.arange(probe.length)[None, :] <= torch.arange(probe.length)[:, None]
            keep = probe.padding().bool() if padding is not None else torch.ones(probe.batch, probe.length).bool()
            expected = expected[None, None] & keep[:, None, None, :]
            rows = keep[:, None, :, None]  # what a padded query sees does not matter
            if not torch.equal(
                (visible & rows).expand(probe.batch, -1, -1, -1), (expected & rows).expand(-1, visible.shape[1], -1, -1)
            ):
                return f"it differs at batch {probe.batch}, length {probe.length}" + (
                    " with left padding" if probe.left else ""
                )
        return None

    def _visible(
        self, mask: Node, hides: bool, leaves: list[Node], padding: Node | None, probe: _Probe, numbers: list[int]
    ) -> Tensor:
        env = self._bind(mask, leaves, probe)
        feed: dict[Node, Tensor] = dict(self._constants)
        for leaf in leaves:
            if leaf is padding:
                feed[leaf] = probe.padding().to(value(leaf).dtype)
            else:
                feed[leaf] = _noise(probe, numbers).to(value(leaf).dtype)
        got: Tensor = evaluate([mask], feed, env)[0]
        got = got[(None,) * (4 - got.dim())]
        if tuple(got.shape[-2:]) != (probe.length, probe.length):
            raise NoMatch(f"the mask is {tuple(got.shape)} for {probe.length} tokens: capture without a cache", mask)
        if got.dtype == torch.bool:
            return ~got if hides else got
        hidden = got <= -1e4
        if not bool(((got == 0) | hidden).all()):
            raise NoMatch("the additive mask carries a bias, not only 0 and -inf", mask)
        return ~hidden

    def _bind(self, mask: Node, leaves: list[Node], probe: _Probe) -> dict[sympy.Symbol, int]:
        env: dict[sympy.Symbol, int] = {}
        for node in leaves or self._inputs:
            if is_tensor(node) and len(shape(node)) >= 2:
                _bind_size(shape(node)[0], probe.batch, env)
                _bind_size(shape(node)[1], probe.length, env)
        for size in shape(mask)[-2:]:
            if not symbols(size):
                raise NoMatch("the mask has a fixed length: export with a dynamic sequence", mask)
            _bind_size(size, probe.length, env)
        _bind_size(shape(mask)[0], probe.batch, env)
        for leaf in leaves:
            if [concrete(s, env) for s in shape(leaf)] != [probe.batch, probe.length]:
                raise NoMatch(f"the mask's input {leaf.name} does not cover the keys", mask)
        return env


def _is_size(node: Node) -> bool:
    """Sizes are bound by the probe: whose size it is does not matter."""
    return node.target is aten.sym_size.int


def _bind_size(size: object, number: int, env: dict[sympy.Symbol, int]) -> None:
    if isinstance(size, torch.SymInt) and torch_private.expression(size).is_Symbol:
        env.setdefault(torch_private.expression(size), number)


def _noise(probe: _Probe, numbers: list[int]) -> Tensor:
    """[batch, length] for an input that must not matter: every number the mask may compare it with occurs."""
    pool = torch.tensor(sorted({0, 1, 2, *numbers}))
    return pool[torch.arange(probe.batch * probe.length) % len(pool)].view(probe.batch, probe.length)


def _lengths(cone: Iterable[Node], constants: Mapping[Node, Tensor]) -> tuple[list[int], float]:
    """(numbers in the mask's arithmetic, the longest window, chunk or offset they can make).

    A division stretches what its result is compared with. Raises NoMatch on arithmetic that stretches otherwise.
    """
    numbers: list[int] = []
    stretch: dict[Node, float] = {}
    for node in sorted(cone):
        stretch[node] = max((stretch.get(source, 1.0) for source in node.all_input_nodes), default=1.0)
        if node in constants:
            numbers += _numbers_of_constant(constants[node])
        elif node.op == "call_function" and _op_name(node) in _CURVED:
            raise NoMatch(f"the mask is computed with {node.target}, which is not how causality is", node)
        elif node.op == "call_function":
            plain = [a for a in [*node.args, *node.kwargs.values()] if isinstance(a, int | float)]
            if _op_name(node) in _STRETCHING:
                stretch[node] *= _factor(_op_name(node), plain)
            elif node.target not in _FILLS:
                numbers += [math.ceil(abs(a)) for a in plain if abs(a) < END]
            numbers += [abs(n) for a in node.args if isinstance(a, tuple | list) for n in integers(a) if abs(n) < END]
    return numbers, max([1, *numbers]) * max(stretch.values(), default=1.0)


def _factor(name: str, numbers: list[int | float]) -> float:
    """By how much dividing by a number, or multiplying with a fraction, stretches."""
    divisors = [2.0**n if "shift" in name else 1 / n if name == "mul" and n else n for n in map(abs, numbers)]
    return math.prod(max(1.0, d) for d in divisors)


def _numbers_of_constant(constant: Tensor) -> list[int]:
    """Its sizes, for it may be a table of distances, and its values."""
    values = constant.double().abs().flatten()
    values = values[values < END]
    return [*constant.shape, *([math.ceil(values.max())] if values.numel() else [])]


def _op_name(node: Node) -> str:
    name = str(node.target)
    return name.split(".")[1] if name.startswith("aten.") else getattr(node.target, "__name__", name)


def _reaches_rotation(leaf: Node, limit: int = 400) -> bool:
    """True for position ids: an input that feeds cos or sin before any projection."""
    seen: set[Node] = set()
    stack = [leaf]
    while stack and len(seen) < limit:
        node = stack.pop()
        if node in seen or node.target in (aten.linear.default, aten.embedding.default):
            continue
        seen.add(node)
        if node.target in (aten.cos.default, aten.sin.default, aten.polar.default):
            return True
        stack.extend(user for user in node.users if is_tensor(user))
    return False
