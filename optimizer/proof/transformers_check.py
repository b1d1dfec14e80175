"""The written checkpoint, held against transformers' own classes: does it load, is it dense below index_topk, is it our graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ...compat.torch_private import topk_rule
from ...errors import UserError
from ...files.json_files import read_json
from ...files.safetensors_index import INDEX_FILE
from ...runtime.logits import Logits
from ..model.checkpoint import Checkpoint
from ..model.free_memory import free_memory
from ..model.stored_formats import FP8, block_of
from ..model.text import generation_config
from .check import logits_difference
from .streamed_model import StreamedModel, loading_bytes, quiet, tensor_sizes

# Fixed by what a model needs beside its weights: activations, and what the allocator keeps.
SHARE_OF_MEMORY = 0.9  # of what is free
# Fixed by float32: where the head weights of a query cancel, its scores are small and their rounding is that of any other row. Of 32
# layers of random weights with Youtu-LLM-2B's shape, rows of a thousandth of the usual scores were off by 2e-3 of their own.
CANCELLED = 0.1  # of the median over rows of the largest score


# What transformers needs to dequantise a checkpoint, by quant_method.
_READERS = {"fp8": ("accelerate",), "compressed-tensors": ("accelerate", "compressed_tensors")}


def lowest_slot_ties() -> AbstractContextManager[None]:
    """transformers' indexer breaks exact ties of its top-k as torch.topk happens to; ours takes the lowest slot.

    ReLU makes ties at zero common, so for a comparison each 3-D top-k gets our rule. Nothing else is touched.
    """

    def rule(scores: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
        if scores.dim() != 3:
            return None
        ordered = torch.sort(scores, dim=-1, descending=True, stable=True)
        return ordered.values[..., :count], ordered.indices[..., :count]

    return topk_rule(rule)


class SameSelection:
    """Makes transformers' indexers take the slots our graph took, and measures how far those are from their own choice.

    Two implementations round differently, so where two keys score all but equally each may take another one; what such a
    key carries is a question of the model, not of correctness. Selections are therefore held against transformers' own
    scores (`shortfall`), and everything else is compared over equal selections.

    selections: our indices per layer, [1, T, K] int32 with -1 for unused. shortfall: the most by which a key of ours
    scores below the last one transformers would take, relative to the largest score of its row, or to CANCELLED of what that usually
    is; 0 when the sets agree, infinite when we took fewer.
    """

    def __init__(self, selections: Sequence[Tensor]) -> None:
        self._selections = list(selections)
        self.used = 0
        self.shortfall = 0.0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """While it lasts, a top-k of scores [1, T, T] is one of ours, in order. Raises UserError unless there is one a layer."""
        self.used = 0
        with topk_rule(self._rule):
            yield
        if self.used != len(self._selections):
            import transformers

            raise UserError(
                f"transformers {transformers.__version__} selected keys {self.used} times with a top-k of scores [1, tokens, tokens],"
                f" expected {len(self._selections)}, once a layer: its indexer works in another way than the one mla2dsa was tested"
                " with; install the transformers that constraints.txt names, or pass --skip-transformers"
            )

    def _rule(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
        if scores.dim() != 3 or scores.shape[0] != 1 or scores.shape[1] != scores.shape[2]:
            return None  # a router's
        self.used += 1
        if self.used > len(self._selections):
            return None  # counted, and refused at the end
        ours = self._selections[self.used - 1].to(scores.device)
        if ours.shape != (*scores.shape[:2], count):
            raise UserError(
                f"layer {self.used} of transformers' model selects {count} of {scores.shape[2]} keys, our graph {ours.shape[2]} of"
                f" {ours.shape[1]}: config.json and the graph disagree on index_topk"
            )
        return self._take(ours, scores, count)

    def _take(self, ours: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """scores: [1, T, T], -inf for keys a query may not see; rows with fewer keys than `count` take all of them."""
        last = torch.topk(scores, count, dim=-1).values[..., -1]
        chosen = scores.gather(-1, ours.clamp(min=0).long()).masked_fill(ours < 0, torch.inf)
        largest = scores.masked_fill(scores == -torch.inf, 0).abs().amax(-1)
        usual = (CANCELLED * largest.median()).clamp_min(torch.finfo(scores.dtype).tiny)
        gap = (last - chosen.amin(-1)) / largest.maximum(usual)  # -inf where a row has no more keys than places
        complete = (ours >= 0).sum(-1) == (scores != -torch.inf).sum(-1).clamp(max=count)
        worst = float(torch.where(complete, gap.clamp_min(0), torch.inf).max())
        self.shortfall = worst if worst != worst else max(self.shortfall, worst)
        hidden = scores.shape[-1] - 1  # an unused place: a key in the future of every row that has one
        indices = ours.masked_fill(ours < 0, hidden).long()
        return scores.gather(-1, indices), indices


def refuse_if_too_large(checkpoint: Checkpoint) -> None:
    """Raises UserError when a float32 model, a group of layers at a time, would not fit into the memory that is free now, and when
    transformers would not read the files."""
    needed = loading_bytes(tensor_sizes(checkpoint.tensors))
    free = free_memory()
    if needed > SHARE_OF_MEMORY * free:
        raise UserError(
            f"{checkpoint.path}: comparing with transformers needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free; "
            "pass --skip-transformers to verify on our graph only"
        )
    with quiet():
        generation_config(checkpoint.path, "mend or remove it, or pass --skip-transformers")
    index = checkpoint.path / INDEX_FILE
    if index.is_file() and not isinstance(read_json(index).get("metadata"), dict):
        raise UserError(
            f'{index}: has no "metadata", without which transformers reads no index; add "metadata": {{}}, or pass --skip-transformers'
        )
    if reason := unreadable(checkpoint):
        raise UserError(
            f"{checkpoint.path}: {reason}; or pass --skip-transformers to verify on the streamed (dequantised) graph only"
        )


def unreadable(checkpoint: Checkpoint) -> str | None:
    """Why transformers does not read a quantised checkpoint here, dequantised on the CPU; None if it does."""
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method is None:
        return None
    if method not in _READERS:
        return f"transformers does not dequantise {method} on a CPU: verify on a machine where it runs the model"
    missing = [name for name in _READERS[method] if find_spec(name) is None]
    packages = " and ".join(missing).replace("_", "-")
    if missing:
        return f"transformers needs {packages} for {method} (pip install 'mla2dsa[quantised]')"
    uneven = next(
        (name for name, place in checkpoint.tensors.items() if place.dtype in FP8 and _uneven(checkpoint, name)), None
    )
    return (
        None
        if uneven is None
        else f"transformers cuts {uneven} into blocks of equal size, but its last ones are smaller"
    )


def _uneven(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the last FP8 block of a row or column is smaller than the others: transformers 5.23 and 5.24 divide evenly."""
    sizes, steps = checkpoint.tensors[name].shape, block_of(checkpoint.config)
    return any(size > step and size % step for size, step in zip(sizes, steps, strict=True))


class _Kept(nn.Module):
    """In the place of a model's head: keeps what it is given, and gives something that can be told from all else."""

    VALUE = 0.3  # fixed by what a scale, a bias and a soft cap make another one of
    given: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.x, self.given = x, x.new_full((1,), self.VALUE)
        return self.given

    def is_given_out(self, found: Any) -> bool:
        """Whether a model gave it out as it was given, and wrote nothing to it."""
        given = self.given
        return given is not None and found is given and torch.equal(given, torch.full_like(given, self.VALUE))


def logits(model: Any, batch: Mapping[str, Tensor]) -> Logits:
    """[B, T, vocab] without a cache, ties broken by lowest slot."""
    return _run(model, batch, lowest_slot_ties)


@torch.no_grad()
def _run(model: Any, batch: Mapping[str, Tensor], rule: Callable[[], AbstractContextManager[None]]) -> Logits:
    """Logits, as rows of them are asked for, unless the model does more with them than to give them out. rule: each run's."""
    head, kept = model.get_output_embeddings(), _Kept()
    model.set_output_embeddings(kept)
    try:
        with rule():
            found = model(**batch, use_cache=False).logits
    finally:
        model.set_output_embeddings(head)
    if not kept.is_given_out(found):
        with rule():
            return Logits(model(**batch, use_cache=False).logits)
    layer = head.weight.detach(), None if head.bias is None else head.bias.detach()
    return Logits(kept.x, lambda: layer)


def loaded_logits(checkpoint: Checkpoint, class_name: str, batch: Mapping[str, Tensor]) -> tuple[Logits, list[str]]:
    """(logits, what is wrong with the files) of a checkpoint, through `class_name` of transformers."""
    with StreamedModel.of(checkpoint, class_name) as model:
        return logits(model, batch), model.faults()


def parity(
    model: Any, batch: Mapping[str, Tensor], expected: Logits, selections: Sequence[Tensor]
) -> tuple[float, float]:
    """(relative difference of the logits over equal selections, shortfall of our selections) on one sequence.

    expected: our logits [1, T, vocab]; selections: our indices per layer [1, T, K]. Raises UserError when transformers does
    not select keys once a layer.
    """
    selection = SameSelection(selections)
    found = _run(model, batch, selection.taken)
    return logits_difference(found, expected), selection.shortfall
