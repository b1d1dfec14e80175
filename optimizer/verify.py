"""Prove a conversion: exactness below index_topk, agreement with transformers, and quality on text above it.

A check that does not hold makes the verification fail; there are no warnings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, UserError
from ..kernels.spec import IndexerConfig, IndexerWeights
from ..passes.mla_to_dsa import Converted, mla_to_dsa
from ..runtime.execute import PieceRunner
from .environment import usable_device
from .model.cached_model import dense_config
from .model.capture import Capture, capture, read_config
from .model.checkpoint import Checkpoint
from .model.every_tensor import check_every_tensor, with_true_quantisation
from .model.text import model_tokens
from .model.weights import WeightSource
from .proof import transformers_check as hf
from .proof.check import compare
from .proof.evaluate import LayerRecall, TextResult, layer_recalls, on_text, program_inputs, selection_runners
from .recipe import Verify

# benchmarks/constants.py: good conversions are at 1.5e-6, one dense weight off by its last bit at 2e-5.
GRAPH_TOLERANCE = 1e-5  # relative, float32, dense graph against converted graph
# benchmarks/constants.py: good conversions are at 1e-6, rms_norm_eps doubled at 5e-5, 1e-5 for 1e-6 at 4e-4 and at 2e-4 in the keys.
TRANSFORMERS_TOLERANCE = 1e-4  # relative, float32, converted graph against DeepseekV32ForCausalLM
# benchmarks/constants.py: 16 tokens do not see one weight off by its last bit, 64 or more do, alike.
SHORT = 256  # tokens of the exactness check, at most
PARITY_SEQUENCES = 2  # benchmarks/constants.py: 1, 2 and 4 differ as much
# Fields of config.json that change nothing in what the graph computes.
_NOT_THE_GRAPH = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "model_type",
    "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_NULLS = {"attention_dropout": 0.0, "norm_topk_prob": False}  # what null means to deepseek_v3
CONVERT_AGAIN = "fetch the files again, or convert again"
NOT_A_PAIR = "compare with the checkpoint that the DSA one was made from, and convert again if a file was changed"
CALIBRATE_BETTER = "calibrate on more text like it, with --indexer distil or a larger --index-topk"


@dataclass(frozen=True)
class Check:
    """One thing that was held against its limit. detail: where it failed, or what was looked at; remedy: if it fails."""

    name: str
    passed: bool
    value: float
    limit: float
    detail: str
    remedy: str


@dataclass(frozen=True)
class Verification:
    """All checks, recall per layer, and the text figures. `origin` says what text it was, or that it was random tokens."""

    checks: tuple[Check, ...]
    layers: tuple[LayerRecall, ...]
    text: TextResult
    origin: str
    skipped: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def failure(self) -> str:
        """The first check that failed, as one line."""
        bad = next(check for check in self.checks if not check.passed)
        return f"verification failed: {bad.name}: {bad.value:.3g}, expected at most {bad.limit:.3g} ({bad.detail}); {bad.remedy}"


@dataclass(frozen=True)
class Pair:
    """A dense checkpoint and the DSA checkpoint made from it, with the graphs of both."""

    dense: WeightSource
    sparse: WeightSource
    converted: Converted
    config: IndexerConfig

    @property
    def layers(self) -> list[tuple[str, str, str]]:
        return [(change.name, change.before, change.after) for change in self.converted.changes]

    def runners(self) -> tuple[PieceRunner, dict[str, PieceRunner]]:
        dense_program, sparse_program = self.dense.capture.program, self.converted.program
        dense = PieceRunner(dense_program, self.dense.loader(dense_program), [old for _, old, _ in self.layers])
        load = self.sparse.loader(sparse_program)
        return dense, selection_runners(sparse_program, load, [new for _, _, new in self.layers])

    def indexers(self) -> dict[str, IndexerWeights]:
        found = {}
        for name, _, _ in self.layers:
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
) -> Pair:
    """Open both and rewrite the dense graph. Raises UserError when they do not belong together.

    captured: the dense graph, if it is at hand. config_file: the name of the DSA checkpoint's config.json. drop_stale: of the
    dense one, as in `prepare`.
    """
    base, made = Checkpoint.open(dense), Checkpoint.open(dsa, config_file=config_file)
    if base.is_dsa():
        raise UserError(f"{dense}: has an indexer, expected the dense checkpoint first")
    base, made = with_true_quantisation(base, drop_stale), with_true_quantisation(made)
    config = _indexer_config(made)
    _check_same_model(base, made)
    captured = captured or capture(base.config)
    converted = mla_to_dsa(captured.program, config)
    dense_source, sparse_source = WeightSource(base, captured, device), WeightSource(made, captured, device)
    base.check_shapes(dense_source.expected())
    check_every_tensor(dense_source)
    indexers = {
        f"{site.name}.indexer.{name}": shape
        for site in converted.found.sites
        for name, shape in IndexerWeights.shapes(config, site.dims.hidden_size, site.dims.q_width).items()
    }
    made.check_shapes(sparse_source.expected() | indexers)
    check_every_tensor(sparse_source, indexers)
    return Pair(dense_source, sparse_source, converted, config)


def _check_same_model(base: Checkpoint, made: Checkpoint) -> None:
    """One graph is held against the other, so both config.json have to mean the same but for the indexer."""
    one, two = (read_config(config) for config in (base.config, dense_config(made)))
    known = type(one)().to_dict().keys() - _NOT_THE_GRAPH  # what the class acts upon
    meant = [
        {name: _NULLS.get(name) if value is None else value for name, value in it.to_dict().items()}
        for it in (one, two)
    ]
    differing = sorted(name for name in known if meant[0].get(name) != meant[1].get(name))
    if differing:
        raise UserError(
            f"{made.path / made.config_file}: {', '.join(differing)} other than in {base.path / base.config_file}; "
            f"set both alike, or {CONVERT_AGAIN}"
        )


def _indexer_config(made: Checkpoint) -> IndexerConfig:
    """Sizes of the indexers in a deepseek_v32 checkpoint. Raises UserError when it is none, or not half-split."""
    file = made.path / made.config_file
    if made.config.get("model_type") != "deepseek_v32":
        raise UserError(
            f"{file}: model_type is {made.config.get('model_type')!r}, expected deepseek_v32; give the DSA checkpoint second"
        )
    if made.config.get("indexer_rope_interleave"):
        raise UserError(
            f"{file}: indexer_rope_interleave is true, but deepseek_v32 rotates its indexer half-split; set it to false"
        )
    sizes = []
    for name in ("index_topk", "index_n_heads", "index_head_dim"):
        size = made.config.get(name)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"{file}: {name} is {size!r}, expected a positive number; {CONVERT_AGAIN}")
        sizes.append(size)
    topk, heads, width = sizes
    return IndexerConfig(topk, heads, width)


def verify(
    pair: Pair,
    sequences: Sequence[Tensor],
    origin: str,
    max_loss_delta: float,
    skip_transformers: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Run every check. sequences: [L] held-out token ids, L > index_topk."""
    topk = pair.config.index_topk
    if len(sequences[0]) <= topk + 1:
        raise UserError(
            f"{origin}: sequences of {len(sequences[0])} tokens, expected more than index_topk {topk}; give longer text"
        )
    report = on_progress or (lambda stage, done, total: None)
    checks = [_exactness(pair, sequences)]
    report("exactness", 1, 1)
    skipped = []
    if skip_transformers:
        skipped.append("transformers (asked for)")
    else:
        checks += _against_transformers(pair, sequences)
        report("transformers", 1, 1)
    dense, selections = pair.runners()
    text = on_text(
        dense, selections, sequences, topk, pair.dense.device, lambda done, total: report("text", done, total)
    )
    layers = layer_recalls(pair.dense, pair.indexers(), pair.config, sequences)
    checks += _quality(text, layers, max_loss_delta)
    return Verification(tuple(checks), tuple(layers), text, origin, tuple(skipped))


def _exactness(pair: Pair, sequences: Sequence[Tensor]) -> Check:
    """index_topk tokens or fewer: everything is selected, so both graphs must agree in every layer."""
    length = min(pair.config.index_topk, SHORT, len(sequences[0]))
    batch = program_inputs(sequences[0][:length], pair.dense.device)
    padded = _left_padded(sequences, length, pair.dense.device)
    result = compare(
        pair.dense.capture.program, pair.converted.program, [batch, padded], pair.layers, GRAPH_TOLERANCE,
        pair.dense.loader(pair.dense.capture.program), pair.sparse.loader(pair.converted.program),
    )  # fmt: skip
    bad = result.first_bad
    detail = f"first differs in {bad}" if bad else f"{length} tokens, all layers and logits, with and without padding"
    name = "dense = DSA up to index_topk (graph)"
    return Check(name, bad is None, result.worst, GRAPH_TOLERANCE, detail, NOT_A_PAIR)


def _left_padded(sequences: Sequence[Tensor], length: int, device: str) -> dict[str, Tensor]:
    """Two rows, the first a third shorter and padded on the left."""
    rows = [sequences[0][:length], sequences[-1][:length]]
    batch = {name: torch.cat([program_inputs(row)[name] for row in rows]) for name in program_inputs(rows[0])}
    batch["attention_mask"][0, : length // 3] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _against_transformers(pair: Pair, sequences: Sequence[Tensor]) -> list[Check]:
    """Load both checkpoints with transformers: keys, bit equality below index_topk, our graph above it."""
    hf.refuse_if_too_large(pair.sparse.checkpoint)
    model, info = hf.load_model(pair.sparse.checkpoint, "DeepseekV32ForCausalLM")
    faults = hf.loading_faults(info)
    checks = [
        Check(
            "transformers loads it, no key missing or unexpected",
            not faults,
            len(faults),
            0,
            faults[0] if faults else "DeepseekV32ForCausalLM",
            CONVERT_AGAIN,
        )
    ]
    if faults:
        return checks
    length = min(pair.config.index_topk, SHORT, len(sequences[0]))
    short = program_inputs(sequences[0][:length])
    sparse_short = hf.logits(model, short)
    dense_model, _ = hf.load_model(pair.dense.checkpoint, "DeepseekV3ForCausalLM")
    gap = float((hf.logits(dense_model, short) - sparse_short).abs().max())
    del dense_model
    checks.append(
        Check(
            "dense = DSA up to index_topk (transformers, bit for bit)",
            gap == 0.0,
            gap,
            0.0,
            f"{length} tokens",
            NOT_A_PAIR,
        )
    )
    return checks + _parity(pair, model, sequences[:PARITY_SEQUENCES])


def _parity(pair: Pair, model: Any, sequences: Sequence[Tensor]) -> list[Check]:
    """Our graph and transformers above index_topk: the same keys up to rounding, and the same logits over the same keys."""
    _, runners = pair.runners()
    selectors = [
        n.name for n in pair.converted.program.graph.nodes if n.target is torch.ops.mla2dsa.lightning_indexer.default
    ]
    batches = [program_inputs(ids, pair.sparse.device) for ids in sequences]
    logits = runners["dsa"].outputs[0]
    gathered: list[dict[str, Tensor]] = [{} for _ in batches]
    for seen in runners["dsa"].run(batches, [logits, *selectors]):
        gathered[seen.sequence].update(seen.values)
    results = [
        hf.parity(model, program_inputs(ids), found[logits].cpu(), [found[name].cpu() for name in selectors])
        for ids, found in zip(sequences, gathered, strict=True)
    ]
    detail = f"{len(sequences)} sequences of {len(sequences[0])} tokens"
    remedy = "compare both config.json; where they agree, please report it"
    limit = TRANSFORMERS_TOLERANCE
    names = (
        "graph = DeepseekV32ForCausalLM above index_topk",
        "keys selected = DeepseekV32ForCausalLM's, up to rounding",
    )
    worst = [max(values, key=lambda v: (v != v, v)) for values in zip(*results, strict=True)]  # NaN is the worst of all
    return [Check(name, value <= limit, value, limit, detail, remedy) for name, value in zip(names, worst, strict=True)]


def _quality(text: TextResult, layers: Sequence[LayerRecall], max_loss_delta: float) -> list[Check]:
    """On random tokens the loss says little (a model that is sure of the wrong token gains by any damage); the rest does."""
    dsa, window = text.by_selection["dsa"], text.by_selection["window"]
    weakest = max(layers, key=lambda layer: layer.chance - layer.dsa)
    missed, allowed = (
        1 - sum(values) / len(layers) for values in ([r.dsa for r in layers], [r.window for r in layers])
    )
    return [
        _better("loss increase on text, nats/token", dsa.loss_delta, max_loss_delta, "all layers sparse"),
        _better("KL to the dense model, no more than with a window of the same size", dsa.kl, window.kl, "all layers sparse"),
        _better("attention mass missed, no more than a window of the same size misses", missed, allowed, "mean of the layers"),
        _better("attention mass missed in a layer, no more than chance misses", 1 - weakest.dsa, 1 - weakest.chance, weakest.name),
    ]  # fmt: skip


def _better(name: str, value: float, limit: float, detail: str) -> Check:
    return Check(name, value <= limit, value, limit, detail, CALIBRATE_BETTER)


def verify_folders(
    dense: Path,
    dsa: Path,
    text: str | None = None,
    *,
    sequences: int = 8,
    sequence_length: int | None = None,
    max_loss_delta: float | None = None,
    skip_transformers: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    drop_stale: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Open both folders, read `text` (random tokens without one), and run every check. Raises UserError."""
    if sequences < 1:
        raise UsageError(f"--sequences {sequences}, expected at least 1")
    pair = open_pair(dense, dsa, usable_device(device), drop_stale=drop_stale)
    if not skip_transformers:
        hf.refuse_if_too_large(pair.sparse.checkpoint)
    topk, context = pair.config.index_topk, pair.dense.capture.max_length
    length = min(context, max(1024, 4 * topk)) if sequence_length is None else sequence_length
    if not topk + 1 < length <= context:
        raise UsageError(
            f"--sequence-length {length}, expected more than index_topk {topk} and at most the context of {context} tokens"
        )
    tokens = model_tokens(pair.dense.checkpoint, text, length * sequences, trust_remote_code=trust_remote_code)
    chosen = tokens.sequences(length, sequences)
    limit = Verify().max_loss_delta if max_loss_delta is None else max_loss_delta
    return verify(pair, chosen, tokens.origin, limit, skip_transformers, on_progress)
