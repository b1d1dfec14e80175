"""Which runtimes would load the result, from config.json and headers: what `plan` tells and `--target` makes binding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...exporters.dsa.config import DsaSizes
from ...exporters.dsa.layout import Layout
from ...exporters.dsa.targets import NAMES, Verdict, facts_of, verdicts
from ...files.json_files import read_json
from ...files.safetensors_index import TensorLocation
from ..model.stored_formats import mtp_tensors

_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


@dataclass(frozen=True)
class Written:
    """Sizes of the indexers, before torch is there."""

    index_topk: int
    index_n_heads: int
    index_head_dim: int
    shared: tuple[int, ...] = ()


def target_verdicts(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorLocation], layout: Layout, sizes: DsaSizes,
    names: Iterable[str] = NAMES, mtp_indexers: bool = False,
) -> tuple[Verdict, ...]:  # fmt: skip
    """What the targets make of a model in `folder` written so. config, tensors: its text model's; mtp_indexers: the layers of
    multi-token prediction get indexers."""
    kept = layout.mtp == "keep" and bool(mtp_tensors(config, tensors))
    count = config.get("num_nextn_predict_layers") or 1
    facts = facts_of(config, layout, sizes, count if kept else 0, has_chat_template(folder), mtp_indexers)
    return verdicts(facts, names)


def has_chat_template(folder: Path) -> bool:
    """Whether a model has a chat template of its own."""
    if any((folder / name).exists() for name in _TEMPLATES):
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    except UserError:  # no tokenizer, or one that is damaged: what reads it says so
        return False
