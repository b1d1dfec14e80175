"""Every tensor of a checkpoint is read by the graph, or known to be none of it: a weight that is left out silently makes another
model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from ...errors import UserError
from ...files.safetensors_index import some
from .checkpoint import Checkpoint
from .stored_formats import FP8, PLAIN, SCALES, check_formats, mtp_tensors, stale_fields
from .weights import WeightSource

_ROWS = 4096  # of two tensors that are compared at a time
_COMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")  # tables that old checkpoints store
_CACHE_SCALE = re.compile(r"\.self_attn\.(attn\.)?[kv]_scale$")  # for a runtime that keeps its cache in FP8
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
SAME_REVISION = "fetch config.json and the weights from the same revision"


def with_true_quantisation(checkpoint: Checkpoint, drop_stale: bool = False) -> Checkpoint:
    """`checkpoint`, whose config.json speaks of the quantisation that its tensors have. drop_stale: without the fields that do not.

    Raises UserError for weights that cannot be read, and for such fields.
    """
    if drop_stale:
        stale = stale_fields(checkpoint.config, checkpoint.tensors)
        config, whole = _without(checkpoint.config, stale), checkpoint.whole
        whole = None if whole is None else replace(whole, config=_without(whole.config, stale))
        checkpoint = replace(checkpoint, config=config, whole=whole)
    check_formats(checkpoint.path, checkpoint.tensors, checkpoint.config, checkpoint.config_file)
    return checkpoint


def _without(config: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in fields}


def check_every_tensor(source: WeightSource, others: Collection[str] = ()) -> None:
    """others: names that are read beside those of the captured model (indexers).

    Raises UserError for a tensor that nothing reads, with the likely reason.
    """
    checkpoint = source.checkpoint
    read = {*source.expected(), *others}
    ignored = mtp_tensors(checkpoint.config, checkpoint.tensors) | source.names.surplus()
    passed = read | ignored
    unread = [name for name in checkpoint.tensors if name not in passed and not _known(checkpoint, name, read)]
    for name in unread:
        if (shared := source.shared(name)) is not None and _same(checkpoint, name, shared):
            continue
        alike = [it for it in unread if source.shared(it) is None]
        raise UserError(f"{checkpoint.tensors[name].file}: {_fault(checkpoint, name, alike, shared)}")


def _known(checkpoint: Checkpoint, name: str, read: set[str]) -> bool:
    if name.endswith(SCALES):
        weight = name.removesuffix(SCALES)
        return weight in read and checkpoint.tensors[weight].dtype in FP8
    return bool(_COMPUTED.search(name) or _CACHE_SCALE.search(name))


def _same(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; a few rows of each in memory at a time."""
    from safetensors import safe_open

    one, two = (checkpoint.tensors[it] for it in (name, other))
    if one.shape != two.shape or not {one.dtype, two.dtype} <= set(PLAIN):
        return False
    with safe_open(one.file, framework="pt") as first, safe_open(two.file, framework="pt") as second:
        a, b = first.get_slice(checkpoint.stored_name(name)), second.get_slice(checkpoint.stored_name(other))
        starts = range(0, one.shape[0], _ROWS)
        return all(torch.equal(a[at : at + _ROWS].double(), b[at : at + _ROWS].double()) for at in starts)


def _fault(checkpoint: Checkpoint, name: str, unread: list[str], shared: str | None) -> str:
    config = checkpoint.config_file
    if shared is not None:
        return (
            f"{name} differs from {shared}, and {config} says that they are one (tie_word_embeddings): set tie_word_embeddings "
            f"to false there if this {name} is the model's, or remove the tensor"
        )
    if name.endswith(SCALES):
        weight = name.removesuffix(SCALES)
        found = checkpoint.tensors[weight].dtype if weight in checkpoint.tensors else "not there"
        return f"{name} scales {weight}, which is {found}; fetch both files from the same revision"
    found = (
        f"{some([name, *(it for it in unread if it != name)])}: stored, but nothing in the model of {config} reads it"
    )
    layer, layers = _LAYER.search(name), checkpoint.config.get("num_hidden_layers")
    if layer and isinstance(layers, int) and int(layer[1]) >= layers:
        return f"{found}: num_hidden_layers is {layers}, and layer {layer[1]} is no multi-token-prediction layer; {SAME_REVISION}"
    if name.endswith("_proj.bias"):
        return f"{found}: attention_bias is {checkpoint.config.get('attention_bias', False)}; set it to what the weights have"
    return f"{found}; {SAME_REVISION}, or remove the tensor if it is none of this model"
