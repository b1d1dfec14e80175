"""The written checkpoint, held against transformers' own classes: does it load, is it dense below index_topk, is it our graph."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from .checkpoint import Checkpoint


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
