"""What the sequences of a conversion are cut for: fitting, deciding, looking at signs, proving."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import UsageError, UserError
from ..indexer.sizes import length_fault
from ..model.text import model_tokens, vocabulary_sequences, vocabulary_size
from ..plan import Prepared
from ..recipe import Recipe
from .resources import MOST_HELD_OUT, checking_sequences

HELD_OUT = 8  # one sequence in so many is kept for deciding what is taken, as many for the verification


@dataclass(frozen=True)
class Sequences:
    """calibration: fitted on, and beside: random tokens that are, too. selection: decides what is taken, random tokens in the same
    share; of_text: those of them that are text, on which losses are measured. vocabulary: goes through every token, to look at the
    signs of head weights. proof: the verification's, never seen before it."""

    calibration: list[Tensor]
    beside: list[Tensor]
    selection: list[Tensor]
    of_text: list[Tensor]
    vocabulary: list[Tensor]
    proof: list[Tensor]
    origin: str


def cut_text(prepared: Prepared, recipe: Recipe, trust_remote_code: bool) -> Sequences:
    """Cut the text: most of it calibrates; sequences spread over it choose the snapshot and prove the result."""
    topk, context = prepared.plan.indexer.index_topk, prepared.plan.context
    length = prepared.plan.resources.sequence_length
    if fault := length_fault(length, topk, context):
        raise UsageError(fault)
    wanted = recipe.tokens or length * recipe.sequences
    held = recipe.verify.sequences + MOST_HELD_OUT
    count = wanted + held * length
    text = model_tokens(prepared.checkpoint, recipe.calibration, count, recipe.seed, trust_remote_code)
    if recipe.sequence_length is None:
        length = min(length, len(text.ids) // 3)
    if length <= topk + 1:
        raise UserError(
            f"{text.origin}: {len(text.ids)} tokens, expected at least {3 * (topk + 2)} "
            f"(three sequences longer than index_topk {topk}); give more text"
        )
    everything = text.sequences(length)
    if len(everything) < 3:
        raise UserError(
            f"{text.origin}: {len(text.ids)} tokens, expected at least three sequences of {length}; give more text"
        )
    proof = max(1, min(recipe.verify.sequences, len(everything) // HELD_OUT))
    selection = max(1, min(MOST_HELD_OUT, len(everything) // HELD_OUT))
    held_out = _spread(everything, proof + selection)
    rest = [sequence for sequence in everything if not any(sequence is other for other in held_out)]
    chosen = _spread(held_out, selection)
    proving = [sequence for sequence in held_out if not any(sequence is other for other in chosen)]
    fitted = _spread(rest, max(1, min(len(rest), wanted // length)))
    beside, vocabulary = _random(prepared, recipe, len(fitted), length)
    deciding = chosen + vocabulary[: recipe.random_beside(len(chosen))]
    return Sequences(fitted, beside, deciding, chosen, vocabulary, proving, text.origin)


def _random(prepared: Prepared, recipe: Recipe, fitted: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """(beside the text, of the whole vocabulary)."""
    if recipe.donor is not None:
        return [], []
    size = vocabulary_size(prepared.checkpoint)
    checking, beside = checking_sequences(size, length), recipe.random_beside(fitted)
    cut = vocabulary_sequences(length, checking + beside, size, recipe.seed)
    return cut[checking:], cut[:checking]


def _spread(items: list[Tensor], count: int) -> list[Tensor]:
    """`count` of the items, evenly spaced: a text's end is often unlike the rest of it."""
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
