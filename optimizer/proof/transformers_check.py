"""The written checkpoint, held against transformers' own classes: does it load, is it dense below index_topk, is it our graph."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...errors import UserError
from ..model.checkpoint import Checkpoint
from .check import relative_difference


class LowestSlotTies(TorchFunctionMode):
    """transformers' indexer breaks exact ties of its top-k as torch.topk happens to; ours takes the lowest slot.

    ReLU makes ties at zero common, so for a comparison its 3-D `topk` gets our rule. Nothing else is touched.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.topk and args[0].dim() == 3:
            count = args[1] if len(args) > 1 else kwargs["k"]
            ordered = torch.sort(args[0], dim=-1, descending=True, stable=True)
            return torch.return_types.topk((ordered.values[..., :count], ordered.indices[..., :count]))
        return func(*args, **(kwargs or {}))


class SameSelection(TorchFunctionMode):
    """Makes transformers' indexers take the slots our graph took, and measures how far those are from their own choice.

    Two implementations round differently, so where two keys score all but equally each may take another one; what such a
    key carries is a question of the model, not of correctness. Selections are therefore held against transformers' own
    scores (`shortfall`), and everything else is compared over equal selections.

    selections: our indices per layer, [1, T, K] int32 with -1 for unused. shortfall: the most by which a key of ours
    scores below the last one transformers would take, relative to the largest score of its row; 0 when the sets agree,
    infinite when we took fewer.
    """

    def __init__(self, selections: Sequence[Tensor]) -> None:
        super().__init__()
        self._selections = list(selections)
        self.used = 0
        self.shortfall = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.topk and args[0].dim() == 3 and args[0].shape[-1] == args[0].shape[-2]:
            return self._take_ours(args[0], args[1] if len(args) > 1 else kwargs["k"])
        return func(*args, **(kwargs or {}))

    def _take_ours(self, scores: Tensor, count: int) -> Any:
        """scores: [1, T, T], -inf for keys a query may not see; rows with fewer keys than `count` take all of them."""
        ours = self._selections[self.used].to(scores.device)
        self.used += 1
        last = torch.topk(scores, count, dim=-1).values[..., -1]
        chosen = scores.gather(-1, ours.clamp(min=0).long()).masked_fill(ours < 0, torch.inf)
        largest = scores.masked_fill(scores == -torch.inf, 0).abs().amax(-1).clamp_min(torch.finfo(scores.dtype).tiny)
        gap = (last - chosen.amin(-1)) / largest  # -inf where a row has no more keys than places
        complete = (ours >= 0).sum(-1) == (scores != -torch.inf).sum(-1).clamp(max=count)
        worst = float(torch.where(complete, gap.clamp_min(0), torch.inf).max())
        self.shortfall = worst if worst != worst else max(self.shortfall, worst)
        hidden = scores.shape[-1] - 1  # an unused place: a key in the future of every row that has one
        indices = ours.masked_fill(ours < 0, hidden).long()
        return torch.return_types.topk((scores.gather(-1, indices), indices))


def refuse_if_too_large(checkpoint: Checkpoint) -> None:
    """Raises UserError when the float32 models would not fit into the memory that is free now."""
    needed = 2 * 4 * sum(math.prod(place.shape) for place in checkpoint.tensors.values())  # dense and DSA side by side
    free = _free_memory()
    if needed > 0.9 * free:
        raise UserError(
            f"{checkpoint.path}: comparing with transformers needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free; "
            "pass --skip-transformers to verify on the streamed graph only"
        )
    if checkpoint.config.get("quantization_config"):
        raise UserError(
            f"{checkpoint.path}: transformers runs this quantised model on a GPU only; pass --skip-transformers to verify on the "
            "streamed (dequantised) graph only"
        )


def _free_memory() -> int:
    """Bytes, the page cache counted as free where the kernel says so (SC_AVPHYS_PAGES leaves it out)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_model(checkpoint: Checkpoint, class_name: str) -> tuple[Any, Mapping[str, Any]]:
    """(model in float32, loading info) of a checkpoint, through `class_name` of transformers."""
    import transformers
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model_class = getattr(transformers, class_name)
        config = model_class.config_class.from_pretrained(checkpoint.path / checkpoint.config_file)
        model, info = model_class.from_pretrained(
            checkpoint.path, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return model.eval(), info


def loading_faults(info: Mapping[str, Any]) -> list[str]:
    """What transformers says is wrong with the files: missing, unexpected or mismatched keys."""
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return [f"{kind.replace('_', ' ')}: {name}" for kind in kinds for name in info.get(kind, ())]


@torch.no_grad()
def logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """[B, T, vocab] without a cache, ties broken by lowest slot."""
    with LowestSlotTies():
        out: Tensor = model(**batch, use_cache=False).logits
    return out


@torch.no_grad()
def parity(
    model: Any, batch: Mapping[str, Tensor], expected: Tensor, selections: Sequence[Tensor]
) -> tuple[float, float]:
    """(relative difference of the logits over equal selections, shortfall of our selections) on one sequence.

    expected: our logits [1, T, vocab]; selections: our indices per layer [1, T, K]. NaN where a layer chose nothing alike.
    """
    mode = SameSelection(selections)
    with mode:
        found: Tensor = model(**batch, use_cache=False).logits
    if mode.used != len(selections):
        return float("nan"), float("nan")
    return relative_difference(found, expected), mode.shortfall
