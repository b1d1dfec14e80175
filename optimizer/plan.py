"""The plan: what a conversion would do to a model, and why not, without reading a weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import UsageError, UserError
from ..exporters.dsa.layout import Layout, choose
from ..exporters.dsa.targets import Verdict, as_json, for_targets
from ..kernels.spec import IndexerConfig, IndexerWeights
from ..passes.matching.sites import Miss, MlaDims
from ..passes.mla_to_dsa import Converted, mla_to_dsa
from .before.binding import target_verdicts
from .before.resources import Resources, resources, streams
from .indexer.sizes import indexer_sizes, size_faults
from .model.capture import Capture, capture
from .model.checkpoint import Checkpoint
from .model.donor import Donor
from .model.every_tensor import check_every_tensor, with_true_quantisation
from .model.free_memory import uncollected
from .model.stored_formats import mtp_tensors
from .model.text import vocabulary_size
from .model.weights import WeightSource
from .recipe import Recipe
from .recipes.layers import Told, each_layer

_CHOSEN_LATER = "share: auto: which layers have no indexer is seen by the loss, once there is one for each"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Plan:
    """What will happen. layers: (name, dims) of every MLA attention; misses: attention that is not dense MLA.

    refusal: why no checkpoint can be written for this model now (None: it can). notes: what the user should know. layout: what it
    is written as, with the reason; told: how each layer's indexer is made; targets: which runtimes load that; query_forms: how a
    query latent is made for a model without one, the first that is exact enough on the real weights. resources: what a conversion
    with its verification will take.
    """

    model: str
    model_type: str
    indexer: IndexerConfig
    source: str
    layers: tuple[tuple[str, MlaDims], ...]
    misses: tuple[Miss, ...]
    refusal: str | None
    notes: tuple[str, ...]
    new_parameters: int
    context: int
    resources: Resources
    layout: str = ""
    layout_reason: str = ""
    query_forms: tuple[str, ...] = ()
    targets: tuple[Verdict, ...] = ()
    told: Mapping[str, Told] = field(default_factory=dict)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths worth looking at, the longest the model's context."""
        return tuple(max(1, self.context // part) for part in (16, 4, 1))

    def attention_flops(self, length: int) -> tuple[float, float]:
        """Attention FLOPs of one decoded token at `length`, all layers, counted: (dense absorbed, DSA)."""
        dense = sparse = 0.0
        for number, (_, d) in enumerate(self.layers):
            per_key = 2.0 * d.num_heads * (2 * d.kv_lora_rank + d.qk_rope_head_dim)
            dense += per_key * length
            sparse += per_key * min(length, self.indexer.index_topk)
            if number not in self.indexer.shared:
                sparse += 2.0 * self.indexer.index_n_heads * self.indexer.index_head_dim * length
        return dense, sparse

    @property
    def shared(self) -> list[str]:
        """Names of the layers without an indexer."""
        return [self.layers[number][0] for number in self.indexer.shared]

    def sharing(self, shared: tuple[int, ...]) -> Plan:
        """Once it is known which layers have no indexer."""
        config = replace(self.indexer, shared=shared)
        told = {**self.told, **{name: self.told[name].without() for name in replace(self, indexer=config).shared}}
        notes = tuple(note for note in self.notes if note != _CHOSEN_LATER)
        return replace(
            self, indexer=config, new_parameters=_new_parameters(config, self.layers), told=told, notes=notes
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model, "model_type": self.model_type, "indexer": asdict(self.indexer), "source": self.source,
            "layers": [{"name": name, **asdict(dims)} for name, dims in self.layers],
            "indexers": {name: told.to_json() for name, told in self.told.items()},
            "misses": [asdict(miss) for miss in self.misses], "refusal": self.refusal, "notes": list(self.notes),
            "layout": self.layout, "layout_reason": self.layout_reason, "query_forms": list(self.query_forms),
            "targets": as_json(self.targets),
            "new_parameters": self.new_parameters, "context": self.context,
            "resources": asdict(self.resources),
            "decode_attention_flops": {str(n): dict(zip(("dense", "dsa"), self.attention_flops(n), strict=True)) for n in self.lengths},
        }  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A plan and what making it produced: the captured program and the rewritten one (no weights in either). layout: None where
    the plan has a refusal. mtp_modules: attention of multi-token-prediction layers that gets an indexer, from the donor."""

    plan: Plan
    checkpoint: Checkpoint
    capture: Capture
    converted: Converted
    donor: Donor | None
    layout: Layout | None = None
    mtp_modules: tuple[str, ...] = ()


@uncollected()
def prepare(
    model: str,
    recipe: Recipe,
    allow_partial: bool = False,
    attention: str = "anchor",
    check: Callable[[Checkpoint], None] | None = None,
    drop_stale: bool = False,
) -> Prepared:
    """Open, capture, match and rewrite `model`. Raises UserError for anything that would stop the conversion itself.

    A model whose checkpoint cannot be written yet is still planned; `Plan.refusal` says so. check: looks at the opened
    checkpoint before the capture, which takes a while on large models. drop_stale: a quantization_config that is not about
    these tensors is dropped instead of refused.
    """
    checkpoint = _opened(model, drop_stale)
    if check is not None:
        check(checkpoint)
    captured = capture(checkpoint.config, attention)
    donor = Donor.open(recipe.donor) if recipe.donor else None
    config = indexer_config(recipe, checkpoint.config, captured.max_length, donor)
    converted = mla_to_dsa(captured.program, config, allow_partial=allow_partial)
    layers = tuple((site.name, site.dims) for site in converted.found.sites)
    told = each_layer(recipe, [name for name, _ in layers])
    source = WeightSource(checkpoint, captured)
    checkpoint.check_shapes(source.expected())
    check_every_tensor(source)
    if donor is not None:
        donor.check(converted.found.sites)
    layout, refusal = _layout(checkpoint, recipe, converted)
    mtp = _mtp_modules(donor, layout, checkpoint, converted)
    plan = Plan(
        model=str(model), model_type=str(checkpoint.config.get("model_type")), indexer=config,
        source=f"donor:{recipe.donor}" if recipe.donor else recipe.indexer, layers=layers,
        misses=converted.found.misses, refusal=refusal,
        notes=tuple(_notes(checkpoint, config, layers, recipe, bool(mtp))), new_parameters=_new_parameters(config, layers),
        context=captured.max_length, resources=_resources(source, converted, config, recipe), told=told,
        **_written_as(checkpoint, layout, config, bool(mtp)),
    )  # fmt: skip
    return Prepared(plan, checkpoint, captured, converted, donor, layout, mtp)


def _opened(model: str, drop_stale: bool) -> Checkpoint:
    checkpoint = Checkpoint.open(model)
    if checkpoint.is_dsa():
        raise UserError(f"{model}: already a DSA model (it has an indexer); nothing to convert")
    return with_true_quantisation(checkpoint, drop_stale)


def _mtp_modules(
    donor: Donor | None, layout: Layout | None, checkpoint: Checkpoint, converted: Converted
) -> tuple[str, ...]:
    """As `Prepared.mtp_modules`."""
    if donor is None or layout is None or layout.target is None or layout.mtp == "drop":
        return ()
    return donor.mtp_modules(checkpoint, converted.found.sites)


def _written_as(
    checkpoint: Checkpoint, layout: Layout | None, config: IndexerConfig, mtp_indexers: bool
) -> dict[str, Any]:
    """Fields of a Plan that say what is written."""
    if layout is None:
        return {}
    targets = target_verdicts(
        checkpoint.path, checkpoint.config, checkpoint.tensors, layout, config, mtp_indexers=mtp_indexers
    )
    return {"layout": layout.name, "layout_reason": layout.why, "query_forms": layout.forms, "targets": targets}


def _resources(source: WeightSource, converted: Converted, config: IndexerConfig, recipe: Recipe) -> Resources:
    streamed = streams(source.capture.program, converted, config, recipe.rows, source.checkpoint.tensors)
    return resources(streamed, recipe, source.capture.max_length, vocabulary_size(source.checkpoint))


def layout_of(checkpoint: Checkpoint, recipe: Recipe) -> Layout:
    """The layout that the recipe asks for. Raises UserError when the model cannot be written so."""
    try:
        layout = choose(
            checkpoint.whole_config, checkpoint.whole_tensors, recipe.layout, untie=recipe.untie, mtp=recipe.mtp,
            targets=recipe.target, shares=recipe.shares,
        )  # fmt: skip
        return for_targets(layout, checkpoint.whole_config, recipe.target)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None


def _layout(checkpoint: Checkpoint, recipe: Recipe, converted: Converted) -> tuple[Layout | None, str | None]:
    """(layout, None), or (None, why there is none)."""
    try:
        layout = layout_of(checkpoint, recipe)
    except UserError as error:
        return None, str(error)
    if layout.target is not None and converted.found.misses:
        return None, f"{layout.name} has an indexer in every layer, but {converted.found.misses[0]}; pass --layout own"
    return layout, None


def indexer_config(
    recipe: Recipe, config: Mapping[str, Any], context: int, donor: Donor | None = None
) -> IndexerConfig:
    """Raises UsageError for the first size that does not fit (`size_faults`)."""
    sizes = (
        None if donor is None else (donor.config.index_topk, donor.config.index_n_heads, donor.config.index_head_dim)
    )
    if faults := size_faults(recipe, config, context, sizes):
        raise UsageError(faults[0])
    return IndexerConfig(*indexer_sizes(recipe, config, sizes), shared=tuple(recipe.shared))


def _new_parameters(config: IndexerConfig, layers: tuple[tuple[str, MlaDims], ...]) -> int:
    total = 0
    for _, dims in (layer for number, layer in enumerate(layers) if number not in config.shared):
        for shape in IndexerWeights.shapes(config, dims.hidden_size, dims.q_width).values():
            total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    return total


def _notes(
    checkpoint: Checkpoint,
    config: IndexerConfig,
    layers: tuple[tuple[str, MlaDims], ...],
    recipe: Recipe,
    mtp_indexers: bool,
) -> list[str]:
    notes = []
    if config.index_n_heads not in (32, 64):
        notes.append(f"{config.index_n_heads} index heads: DeepGEMM (vLLM and SGLang on SM90) takes 32 or 64 only")
    mtp = mtp_tensors(checkpoint.config, checkpoint.tensors)
    if mtp and mtp_indexers:
        notes.append(f"{len(mtp)} tensors of multi-token-prediction layers are kept, with the donor's indexers")
    elif mtp:
        what = "left out" if recipe.mtp == "drop" else "kept without an indexer"
        notes.append(
            f"{len(mtp)} tensors of multi-token-prediction layers are {what}: no speculative decoding with them"
        )
    if checkpoint.config.get("attention_bias"):
        notes.append("attention_bias: transformers reads the biases, vLLM leaves them out without a word")
    if others := _without_mla(checkpoint, layers):
        notes.append(f"layers {others} have no MLA attention and stay as they are")
    if recipe.share == "auto":
        notes.append(_CHOSEN_LATER)
    needed = max((d.qk_rope_head_dim + 1 + d.kv_lora_rank for _, d in layers), default=0)
    if config.index_head_dim < needed:
        notes.append(
            f"index_head_dim {config.index_head_dim} keeps the strongest part of the latent ({needed} would keep all)"
        )
    return notes


def _without_mla(checkpoint: Checkpoint, layers: tuple[tuple[str, MlaDims], ...]) -> str:
    """Numbers of the layers that no site is in, as in a hybrid: "0, 1, 2"."""
    count = checkpoint.config.get("num_hidden_layers")
    numbers = {int(found[1]) for name, _ in layers if (found := _LAYER.search(name))}
    return ", ".join(str(layer) for layer in range(count if isinstance(count, int) else 0) if layer not in numbers)
