"""A dense checkpoint and the DSA checkpoint made from it, opened side by side: that they belong together, and the graphs of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...exporters.dsa.config import dsa_config
from ...exporters.dsa.families import LAYOUTS, OWN, family_of
from ...exporters.dsa.layout import Layout, choose
from ...kernels.spec import IndexerConfig, IndexerWeights
from ...passes.mla_to_dsa import Converted, mla_to_dsa
from ...passes.mla_to_dsa import prepare as find_sites
from ...runtime.execute import PieceRunner
from ...runtime.shelf import Shelf
from ..model.cached_model import dense_config, dense_words, indexer_of, layout_name
from ..model.capture import Capture, capture, read_config
from ..model.checkpoint import Checkpoint
from ..model.every_tensor import check_every_tensor, with_true_quantisation
from ..model.stored_formats import mtp_tensors
from ..model.weights import WeightSource
from .evaluate import selection_runners
from .fp8 import Fp8Scores

# Fields of config.json that change nothing in what the graph computes.
_NOT_THE_GRAPH = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "model_type",
    "num_mtp_layers", "num_nextn_predict_layers", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_NULLS = {"attention_dropout": 0.0, "norm_topk_prob": False}  # what null means to deepseek_v3
_DTYPES = (None, "float32", "bfloat16", "float16")  # in which transformers may hold any checkpoint
CONVERT_AGAIN = "fetch the files again, or convert again"
NOT_A_PAIR = "compare with the checkpoint that the DSA one was made from, and convert again if a file was changed"


@dataclass(frozen=True)
class Pair:
    """A dense checkpoint and the DSA checkpoint made from it, with the graphs of both.

    layers: (name, node in the dense graph, node in the converted one) of every attention. sparse: its capture is that of the DSA
    checkpoint's dense base. layout: how the one was written as the other; folded: with other numbers in some tensors.
    """

    dense: WeightSource
    sparse: WeightSource
    converted: Converted
    config: IndexerConfig
    layers: tuple[tuple[str, str, str], ...]
    layout: Layout
    folded: bool = False

    def runners(
        self, shelf: Shelf | None = None, fp8: Fp8Scores | None = None
    ) -> tuple[PieceRunner, dict[str, PieceRunner]]:
        """Of the dense program, and of the selections. shelf, fp8: as in `selection_runners`."""
        dense_program, sparse_program = self.dense.capture.program, self.converted.program
        dense_load, load = self.dense.loader(dense_program), self.sparse.loader(sparse_program)
        dense = PieceRunner(dense_program, dense_load, [old for _, old, _ in self.layers], shelf=shelf)
        return dense, selection_runners(sparse_program, load, [new for _, _, new in self.layers], shelf, fp8)

    def indexers(self) -> dict[str, IndexerWeights]:
        """Of every layer that has one."""
        found = {}
        for name in (name for number, (name, _, _) in enumerate(self.layers) if number not in self.config.shared):
            tensors = IndexerWeights.shapes(self.config, 1, 1)
            load = self.sparse.checkpoint.load
            found[name] = IndexerWeights.from_tensors({t: load(f"{name}.indexer.{t}", torch.float32) for t in tensors})
        return found


def open_pair(
    dense: Path,
    dsa: Path,
    device: str = "cpu",
    captured: Capture | None = None,
    config_file: str = "config.json",
    drop_stale: bool = False,
    allow_partial: bool = False,
) -> Pair:
    """Open both and rewrite the graph of the DSA checkpoint's dense base. Raises UserError when they do not belong together.

    captured: the dense graph, if it is at hand. config_file: the name of the DSA checkpoint's config.json. drop_stale: of the
    dense one, as in `prepare`; allow_partial: likewise.
    """
    base, made = Checkpoint.open(dense), Checkpoint.open(dsa, config_file=config_file)
    if base.is_dsa():
        raise UserError(f"{dense}: has an indexer, expected the dense checkpoint first")
    base, made = with_true_quantisation(base, drop_stale), with_true_quantisation(made)
    config = _indexer_config(made)
    layout = _layout(base, made)
    _check_same_model(base, made, layout, config)
    captured = captured or capture(base.config)
    again = captured if _same_graph(base, made) else capture(dense_config(made))
    converted = mla_to_dsa(again.program, config, allow_partial=allow_partial)
    dense_source, sparse_source = WeightSource(base, captured, device), WeightSource(made, again, device)
    base.check_shapes(dense_source.expected())
    check_every_tensor(dense_source)
    indexers = {
        f"{site.name}.indexer.{name}": shape
        for number, site in enumerate(converted.found.sites)
        if number not in config.shared
        for name, shape in IndexerWeights.shapes(config, site.dims.hidden_size, site.dims.q_width).items()
    }
    made.check_shapes(sparse_source.expected() | indexers)
    check_every_tensor(sparse_source, indexers)
    folded = bool(layout.folding(base.config, base.tensors, mtp_tensors(base.config, base.tensors)).derived)
    return Pair(dense_source, sparse_source, converted, config, _layers(captured, again, converted), layout, folded)


def _layers(dense: Capture, sparse: Capture, converted: Converted) -> tuple[tuple[str, str, str], ...]:
    """(name, node in the dense graph, node in the converted one) of every attention."""
    if dense is sparse:
        return tuple((change.name, change.before, change.after) for change in converted.changes)
    _, found, _ = find_sites(dense.program)
    before = {site.name: site.core.out.name for site in found.sites}
    return tuple((change.name, before[change.name], change.after) for change in converted.changes)


def _layout(base: Checkpoint, made: Checkpoint) -> Layout:
    """How `base` was written as `made`, by what the config.json of both say. Raises UserError when it cannot have been."""
    name, tied = layout_name(made.config), made.config.get("tie_word_embeddings", False)
    family = family_of(base.config)
    wanted = base.config.get("tie_word_embeddings", family is not None and family.tied)
    untie = name != OWN and bool(wanted) and not tied
    kept = bool(mtp_tensors(made.config, made.tensors)) or not mtp_tensors(base.config, base.tensors)
    mtp, readers = "keep" if kept else "drop", family.readers if family is not None else ()
    try:
        layout = choose(base.config, base.tensors, name, untie=untie, mtp=mtp, targets=readers)
    except UserError as error:
        raise UserError(f"{made.path}: not made from {base.path} ({error}); {NOT_A_PAIR}") from None
    if not layout.forms:
        return layout
    by_bias = made.config.get("q_lora_rank") != made.config.get("hidden_size")
    return layout.settled("bias" if by_bias else "identity")


def _check_same_model(base: Checkpoint, made: Checkpoint, layout: Layout, indexer: IndexerConfig) -> None:
    """The config.json of the DSA checkpoint has to mean what a conversion of the dense one would write, or one would be held
    against another model."""
    written = dsa_config(base.config, replace(indexer, rope_interleave=False), [], layout)
    _check_loads_as(made, written)
    one, two = read_config(dense_words(written)), read_config(dense_config(made))
    known = type(one)().to_dict().keys() - _NOT_THE_GRAPH  # what the class acts upon
    first, second = _meaning(one), _meaning(two)
    if differing := sorted(name for name in known if first.get(name) != second.get(name)):
        raise UserError(
            f"{made.path / made.config_file}: {', '.join(differing)} other than in {base.path / base.config_file}; "
            f"set both alike, or {CONVERT_AGAIN}"
        )


def _check_loads_as(made: Checkpoint, written: dict[str, Any]) -> None:
    """Fields that decide what a runtime makes of the files, and no graph shows. written: the config.json of a conversion."""
    for name in ("architectures", "dtype", "torch_dtype"):
        expected, found = written.get(name), made.config.get(name)
        if expected != found and not (found in _DTYPES and name != "architectures"):
            raise UserError(
                f"{made.path / made.config_file}: {name} is {found!r}, expected {expected!r}; {CONVERT_AGAIN}"
            )


def _same_graph(base: Checkpoint, made: Checkpoint) -> bool:
    """Whether the dense base of the DSA checkpoint is captured as the dense model is: most are, and a capture takes a while."""
    one, two = read_config(base.config), read_config(dense_config(made))
    known = type(one)().to_dict().keys() - _NOT_THE_GRAPH
    return type(one) is type(two) and all(_meaning(one).get(name) == _meaning(two).get(name) for name in known)


def _meaning(config: Any) -> dict[str, Any]:
    return {name: _NULLS.get(name) if value is None else value for name, value in config.to_dict().items()}


def _indexer_config(made: Checkpoint) -> IndexerConfig:
    """Sizes of the indexers in a DSA checkpoint. Raises UserError when it is none, or not laid out as its class rotates it."""
    file = made.path / made.config_file
    if not made.is_dsa():
        raise UserError(
            f"{file}: model_type is {made.config.get('model_type')!r} without an indexer; give the DSA checkpoint second"
        )
    try:
        config = indexer_of(made)
    except UserError as error:
        raise UserError(f"{error}; {CONVERT_AGAIN}") from None
    target = LAYOUTS.get(layout_name(made.config))
    interleaved = target is not None and target.interleaved
    if config.rope_interleave != interleaved:
        rotates = "in pairs" if interleaved else "half-split"
        raise UserError(
            f"{file}: indexer_rope_interleave is {str(config.rope_interleave).lower()}, but {layout_name(made.config)} rotates its "
            f"indexer {rotates}; set it to {str(interleaved).lower()}"
        )
    return config
