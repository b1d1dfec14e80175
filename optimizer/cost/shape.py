"""What the cost of a planned model depends on, counted from its graph's parameters and the headers of its files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..plan import Prepared
from .roofline import ModelShape

_EXPERT = re.compile(r"(?:^|\.)experts\.")  # shared experts are called shared_expert(s), and every token passes them
_EMBEDDING = re.compile(r"(?:^|\.)embed_tokens\.weight$")  # looked up, not multiplied
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")
_ROUTED = ("n_routed_experts", "num_experts", "num_local_experts")


def shape_of(prepared: Prepared) -> ModelShape:
    """Of a plan that was just made."""
    plan, config = prepared.plan, prepared.checkpoint.config
    stored = sum(tensor.nbytes for tensor in prepared.checkpoint.tensors.values())
    return ModelShape(
        tuple(dims for _, dims in plan.layers), plan.indexer, active_parameters(prepared.capture.shapes, config),
        float(stored), float(plan.new_parameters),
    )  # fmt: skip


def active_parameters(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> float:
    """Parameters that one token is multiplied with: of routed experts, the share that a token is sent to."""
    experts = sum(math.prod(shape) for name, shape in shapes.items() if _EXPERT.search(name))
    others = sum(
        math.prod(shape) for name, shape in shapes.items() if not _EXPERT.search(name) and not _EMBEDDING.search(name)
    )
    chosen, routed = (_first(config, names) for names in (_CHOSEN, _ROUTED))
    return others + experts * (chosen / routed if chosen and routed else 1.0)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    return next((float(config[name]) for name in names if isinstance(config.get(name), int | float)), None)
