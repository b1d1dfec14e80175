"""MaskProver: what it accepts is causal & key padding at every length, and whatever else is refused, with reason and node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_programs import inputs_of, op_name, outputs_of, program_of
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from mla2dsa.passes.matching.mask import LONGEST_PROBE, MaskProver
from mla2dsa.passes.matching.sites import Core, NoMatch

Mask = Callable[..., Tensor]
LONG = torch.long


def core_with(mask: Node | None, out: Node, hides: bool = False, is_causal: bool = False) -> Core:
    """Queries, keys and values do not matter to a mask."""
    return Core("sdpa", out, out, out, out, 1.0, mask, hides, is_causal)


def prover(program: ExportedProgram) -> MaskProver:
    signature = program.graph_signature
    constants = {
        n: program.constants[name].cpu()
        for n in program.graph.nodes
        if (name := signature.inputs_to_lifted_tensor_constants.get(n.name))
    }
    return MaskProver(inputs_of(program), constants)


def judge(mask: Mask, *inputs: Tensor, hides: bool = False) -> tuple[Node | None, list[Node]]:
    """(the padding input that is found, the inputs). Raises NoMatch."""
    program = program_of(mask, *inputs)
    (out,) = outputs_of(program)
    return prover(program).padding_input(core_with(out, out, hides)), inputs_of(program)


KEEP = torch.ones(2, 7, dtype=LONG)


def grid(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key positions of a [B, S] padding mask."""
    at = torch.arange(mask.shape[1])
    return at[:, None], at[None, :]


def padded(visible: Tensor, mask: Tensor) -> Tensor:
    return visible[None, None] & mask.bool()[:, None, None]


def causal(mask: Tensor) -> Tensor:
    i, j = grid(mask)
    return padded(j <= i, mask)


# Against a brute-force oracle

CAUSAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "less": lambda i, j: j <= i,
    "not greater": lambda i, j: ~(j > i),
    "difference": lambda i, j: (i - j) >= 0,
    "strictly": lambda i, j: j < i + 1,
    "clamped": lambda i, j: (j - i).clamp(min=0) == 0,
    "next too": lambda i, j: j <= i + 1,
    "not itself": lambda i, j: j < i,
    "everything": lambda i, j: i + j >= 0,
}
FURTHER: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "nothing": lambda i, j, n: i >= 0,
    "window": lambda i, j, n: i - j < n,
    "chunk": lambda i, j, n: i // n == j // n,
    "strided": lambda i, j, n: (i - j) % n == 0,
    "first keys": lambda i, j, n: (j < n) | (i >= 0),
    "hidden key": lambda i, j, n: j != n,
    "hidden query": lambda i, j, n: (i != n) | (j == 0),
    "prefix": lambda i, j, n: (i >= n) | (j >= 0),
    "sink and window": lambda i, j, n: (j == 0) | (i - j < n),
    "halved window": lambda i, j, n: (i - j) * 0.5 < n,
}
STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda visible: visible,
    "hides": lambda visible: ~visible,
    "infinity": lambda visible: torch.where(visible, 0.0, float("-inf")),
    "lowest": lambda visible: torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -3e38),
    "product": lambda visible: (1.0 - visible.float()) * -1e9,
}
PADDINGS = ("none", "before", "after")


@dataclass(frozen=True)
class Drawn:
    """A random mask: how causality is spelled, what else is asked, how it is written, and where padding comes in."""

    causal: str
    further: str
    number: int
    style: str
    padding: str

    def visible(self, mask: Tensor) -> Tensor:
        i, j = grid(mask)
        seen = CAUSAL[self.causal](i, j)
        if self.padding == "before":
            seen = padded(seen, mask) & FURTHER[self.further](i, j, self.number)
        elif self.padding == "after":
            seen = padded(seen & FURTHER[self.further](i, j, self.number), mask)
        else:
            seen = (seen & FURTHER[self.further](i, j, self.number)).expand(mask.shape[0], 1, -1, -1)
        return seen

    def __call__(self, mask: Tensor) -> Tensor:
        return STYLES[self.style](self.visible(mask))

    def is_causal_and_padding(self) -> bool:
        """By trying every length up to well past the number, with padding on either side."""
        for length in [*range(1, 12), 2 * self.number + 11]:
            for left, right in [(0, 0), (2, 0), (0, 1)]:
                if left + right >= length:
                    continue
                mask = torch.ones(2, length, dtype=LONG)
                mask[0, :left] = 0
                mask[1, length - right :] = 0
                if self.padding == "none":
                    mask = torch.ones_like(mask)
                real = mask.bool()[:, None, :, None]
                if not torch.equal(self.visible(mask) & real, causal(mask) & real):
                    return False
        return True


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    st.builds(
        Drawn,
        st.sampled_from(sorted(CAUSAL)),
        st.sampled_from(sorted(FURTHER)),
        st.integers(1, 400),
        st.sampled_from(sorted(STYLES)),
        st.sampled_from(PADDINGS),
    )
)
@example(Drawn("less", "window", 300, "bool", "after"))
@example(Drawn("less", "chunk", 199, "infinity", "before"))
@example(Drawn("less", "halved window", 150, "product", "none"))
@example(Drawn("clamped", "first keys", 5, "lowest", "after"))
def test_the_verdict_is_that_of_trying_every_length(drawn: Drawn) -> None:
    expected = drawn.is_causal_and_padding()
    if not expected:
        with pytest.raises(NoMatch):
            judge(drawn, KEEP, hides=drawn.style == "hides")
        return
    padding, inputs = judge(drawn, KEEP, hides=drawn.style == "hides")
    assert padding is (None if drawn.padding == "none" else inputs[0])


# Which input is the padding


@pytest.mark.parametrize("swapped", [False, True])
def test_the_padding_input_is_found_among_others(swapped: bool) -> None:
    def mask(a: Tensor, b: Tensor) -> Tensor:
        keep, other = (b, a) if swapped else (a, b)
        return causal(keep) & (other == other)[:, None, None]

    padding, inputs = judge(mask, KEEP, KEEP.clone())
    assert padding is inputs[swapped]


def test_a_boolean_padding_input_is_one_too() -> None:
    padding, inputs = judge(causal, KEEP.bool())
    assert padding is inputs[0]


def test_an_input_that_only_gives_its_length_is_no_padding() -> None:
    padding, _ = judge(lambda ids: torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(), KEEP)
    assert padding is None


def test_no_mask_is_causal_when_the_core_is() -> None:
    program = program_of(lambda x: x.clone(), KEEP)
    (out,) = outputs_of(program)
    assert prover(program).padding_input(core_with(None, out, is_causal=True)) is None
    with pytest.raises(NoMatch, match=r"^no mask and not causal: bidirectional attention$") as miss:
        prover(program).padding_input(core_with(None, out))
    assert miss.value.node is out


# What is refused


def constant_window(width: int) -> Mask:
    table = torch.arange(1000)[None] > torch.arange(1000)[:, None] - width

    def mask(keep: Tensor) -> Tensor:
        length = keep.shape[1]
        return causal(keep) & table[:length, :length]

    return mask


REFUSED: dict[str, tuple[Mask, tuple[Tensor, ...], str, str]] = {  # mask, its inputs, the reason, op of the node
    "bias": (
        lambda keep: torch.where(causal(keep), (grid(keep)[1] - grid(keep)[0]) * 0.5, float("-inf")), (KEEP,),
        "^the additive mask carries a bias, not only 0 and -inf$", "where",
    ),
    "activations": (
        lambda keep, x: causal(keep) & (x > 0)[:, None, None], (KEEP, torch.ones(2, 7)),
        r"^the mask depends on activations or weights \(args_1\): already sparse, or biased$", "__and__",
    ),
    "three axes": (
        lambda keep: keep[:, None].bool(), (torch.ones(2, 7, 7, dtype=LONG),),
        r"^the mask depends on input args_0, which is not \[batch, sequence\]$", "to",
    ),
    "positions": (
        lambda keep, pos: (causal(keep) & (pos[:, None] == pos[:, :, None])[:, None]).float() + 0 * pos.cos()[:, None, None],
        (KEEP, KEEP.clone()),
        r"^the mask depends on positions \(args_1; packed-sequence detection\): export with an attention_mask input$", "add",
    ),
    "fixed length": (
        lambda keep: torch.ones(5, 5, dtype=torch.bool).tril() & keep[:, :1, None].bool(), (KEEP,),
        "^the mask has a fixed length: export with a dynamic sequence$", "__and__",
    ),
    "too far": (
        lambda keep: causal(keep) & (grid(keep)[0] - grid(keep)[1] < LONGEST_PROBE + 1), (KEEP,),
        "^the mask's arithmetic reaches 8193 tokens: too long to probe$", "__and__",
    ),
    "too far by division": (
        lambda keep: causal(keep) & ((grid(keep)[0] - grid(keep)[1]) // 1000 < 9), (KEEP,),
        "^the mask's arithmetic reaches 9000 tokens: too long to probe$", "__and__",
    ),
    "curved": (
        lambda keep: causal(keep) & ((grid(keep)[0] - grid(keep)[1] + 1).float().sqrt() < 30), (KEEP,),
        "^the mask is computed with aten.sqrt.default, which is not how causality is$", "sqrt",
    ),
    "cached keys": (
        lambda keep: torch.cat([causal(keep), causal(keep)], -1), (KEEP,),
        r"^the mask is \(2, 1, 5, 10\) for 5 tokens: capture without a cache$", "cat",
    ),
    "other layout": (
        lambda keep: causal(keep).view(keep.shape[0], 1, keep.shape[1] // 2, -1), (torch.ones(2, 8, dtype=LONG),),
        "^the mask is not causal plus key padding: it cannot be evaluated .*$", "view",
    ),
    "padding the wrong way round": (
        lambda keep: causal(1 - keep), (KEEP,),
        "^the mask is not causal plus key padding: it differs at batch 2, length 5$", "__and__",
    ),
    "padded queries see nothing, keys everything": (
        lambda keep: (grid(keep)[1] <= grid(keep)[0])[None, None] & keep.bool()[:, None, :, None], (KEEP,),
        "^the mask is not causal plus key padding: it differs at batch 3, length 6 with left padding$", "__and__",
    ),
    "a window in a constant": (
        constant_window(700), (KEEP,),
        "^the mask is not causal plus key padding: it .*$", "__and__",
    ),
    "a float input": (
        lambda keep: causal(keep), (torch.ones(2, 7),),
        r"^the mask depends on activations or weights \(args_0\): already sparse, or biased$", "__and__",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_are_refused(name: str) -> None:
    mask, inputs, reason, op = REFUSED[name]
    with pytest.raises(NoMatch, match=reason) as miss:
        judge(mask, *inputs)
    assert miss.value.node is not None
    assert op_name(miss.value.node) == op


def test_keys_of_another_length_than_the_input_are_refused() -> None:
    """The mask reads an input that covers only every other key."""

    def mask(keep: Tensor, other: Tensor) -> Tensor:
        return causal(keep) & (other.sum() >= 0)

    program = program_of(mask, KEEP, torch.ones(2, 5, dtype=LONG))
    (out,) = outputs_of(program)
    prover(program).padding_input(core_with(out, out))  # its own symbol is bound like the keys'

    fixed = program_of(mask, KEEP, torch.ones(2, 5, dtype=LONG), dynamic=(0,))
    (out,) = outputs_of(fixed)
    with pytest.raises(NoMatch, match=r"^the mask (has a fixed length|'s input)") as miss:
        prover(fixed).padding_input(core_with(out, out))
    assert miss.value.node is out


def test_a_verdict_is_kept_and_repeated() -> None:
    program = program_of(lambda keep: causal(keep) & (grid(keep)[0] - grid(keep)[1] < 3), KEEP)
    (out,) = outputs_of(program)
    judged = prover(program)
    misses = []
    for _ in range(2):
        with pytest.raises(NoMatch) as miss:
            judged.padding_input(core_with(out, out))
        misses.append(miss.value)
    assert misses[0] is misses[1]


def test_a_mask_that_hides_is_another_than_one_that_shows() -> None:
    program = program_of(causal, KEEP)
    (out,) = outputs_of(program)
    judged = prover(program)
    with pytest.raises(NoMatch, match="it differs at batch 2, length 5"):
        judged.padding_input(core_with(out, out, hides=True))
    assert judged.padding_input(core_with(out, out)) is inputs_of(program)[0]
