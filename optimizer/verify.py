"""Prove a conversion: exactness below index_topk, agreement with transformers, and quality on text above it.

A check that does not hold makes the verification fail; there are no warnings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, UserError
from ..files.model.text_model import is_other_part, is_wrapper
from ..kernels.spec import IndexerConfig
from ..runtime.devices import usable_device
from ..runtime.logits import Logits
from ..runtime.processes import processes
from ..runtime.shelf import Shelf
from .model.capture import model_class_of, read_config
from .model.stored_formats import mtp_tensors
from .model.text import load_tokenizer, model_tokens
from .proof import transformers_check as hf
from .proof.check import compare, logits_difference
from .proof.evaluate import LayerRecall, TextResult, layer_recalls, on_text, program_inputs
from .proof.figures import Decode
from .proof.fp8 import Fp8Scores
from .proof.limits import TEXT_GATES, Check, Measured, foreign_checks, gated, quality_checks, read_gates, with_sharing
from .proof.pair import CONVERT_AGAIN, NOT_A_PAIR, Pair, open_pair
from .proof.same_tensors import same_tensors
from .proof.streamed_model import StreamedModel
from .proof.tasks.long import LongResult, Settings, check_lengths, gate_names, long_checks, run_long
from .recipe import Verify

# benchmarks/constants.py: good conversions are at 1.5e-6, one dense weight off by its last bit at 2e-5.
GRAPH_TOLERANCE = 1e-5  # relative, float32, dense graph against converted graph
# benchmarks/constants.py: good conversions are at 1e-6, rms_norm_eps doubled at 5e-5, 1e-5 for 1e-6 at 4e-4 and at 2e-4 in the keys.
TRANSFORMERS_TOLERANCE = 1e-4  # relative, float32, converted graph against transformers' DSA class
# Fixed by float32's rounding: a folded model is the same in other numbers (4e-7 for MiniCPM3), and bit for bit where nothing is folded.
FOLDED_TOLERANCE = 1e-5
# benchmarks/constants.py: 16 tokens do not see one weight off by its last bit, 64 or more do, alike.
SHORT = 256  # tokens of the exactness check, at most
PARITY_SEQUENCES = 2  # benchmarks/constants.py: 1, 2 and 4 differ as much
# benchmarks/memory.py: 64 heads take 2048 tokens, and those of tiny-mla all that its context has.
PARITY_BYTES = 2 * 2**30  # of transformers' scores
PARITY_TOKENS = 64  # past index_topk at least; fixed by what the exactness check needs to see one weight's last bit
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
CLASS_REMEDY = "compare both config.json; where they agree, please report it"


@dataclass(frozen=True)
class Verification:
    """All checks, recall per layer, and the text figures. `origin` says what text it was, or that it was random tokens.

    foreign: the same of a text of another domain, long: the long-context tasks, where they were asked for."""

    checks: tuple[Check, ...]
    layers: tuple[LayerRecall, ...]
    text: TextResult
    origin: str
    skipped: tuple[str, ...] = field(default=())
    foreign: Measured | None = None
    long: LongResult | None = None

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
class Text:
    """sequences: [L] held-out token ids. decode: ids as text, None where there is no tokenizer."""

    sequences: Sequence[Tensor]
    origin: str
    decode: Decode | None = None


class FailedVerification(UserError):
    """A check does not hold. verification: all that was found."""

    def __init__(self, verification: Verification) -> None:
        super().__init__(verification.failure())
        self.verification = verification


def verify(
    pair: Pair,
    sequences: Sequence[Tensor],
    origin: str,
    max_loss_delta: float,
    skip_transformers: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
    shelf: Shelf | None = None,
    *,
    decode: Decode | None = None,
    foreign: Text | None = None,
    fp8: bool = False,
    gates: Mapping[str, float] | None = None,
) -> Verification:
    """Run every check. sequences: [L] held-out token ids, L > index_topk. shelf: where hidden states wait (None: one of its
    own). foreign: text of another domain; fp8: measure the indexers with FP8 scores, too; gates: limits as --gate has them. Of several
    processes, the first compares and all measure; each has the result."""
    shelf, topk = shelf or Shelf(), pair.config.index_topk
    if len(sequences[0]) <= topk + 1:
        raise UserError(
            f"{origin}: sequences of {len(sequences[0])} tokens, expected more than index_topk {topk}; give longer text"
        )
    report = on_progress or (lambda stage, done, total: None)
    checks, skipped = processes().from_first(lambda: _proved_exact(pair, sequences, skip_transformers, report))
    texts = [_measured(pair, Text(sequences, origin, decode), "text", report, shelf, fp8)]
    checks += quality_checks(texts[0], max_loss_delta)
    if foreign is not None:
        texts.append(_measured(pair, foreign, "foreign text", report, shelf, fp8))
        checks += foreign_checks(texts[1], max_loss_delta)
    checks += gated(texts, gates or {})
    shared = [site.name for number, site in enumerate(pair.converted.found.sites) if number in pair.config.shared]
    checks = with_sharing(checks, shared)
    return Verification(
        tuple(checks), texts[0].layers, texts[0].text, origin, tuple(skipped), texts[1] if foreign is not None else None
    )


def _proved_exact(
    pair: Pair, sequences: Sequence[Tensor], skip_transformers: bool, report: Callable[[str, int, int], None]
) -> tuple[list[Check], list[str]]:
    """What says that both are one model: (checks, what was skipped)."""
    checks, skipped = [_exactness(pair, sequences), same_tensors(pair)], []
    report("exactness", 1, 1)
    if skip_transformers:
        return checks, ["transformers (asked for)"]
    checks += _against_transformers(pair, sequences)
    if pair.layout.in_transformers is None:
        skipped.append(f"transformers above index_topk (it has no class with an indexer for {_model_type(pair)})")
    report("transformers", 1, 1)
    return checks, skipped


def _measured(
    pair: Pair, text: Text, stage: str, report: Callable[[str, int, int], None], shelf: Shelf, fp8: bool
) -> Measured:
    scores = Fp8Scores() if fp8 else None
    dense, selections = pair.runners(shelf, scores)
    topk, device = pair.config.index_topk, pair.dense.device
    found = on_text(
        dense, selections, text.sequences, topk, device, lambda done, total: report(stage, done, total), text.decode
    )
    del dense, selections
    if scores is not None:
        found = replace(found, fp8_same_keys=scores.same)
    layers = layer_recalls(pair.sparse, pair.indexers(), pair.config, text.sequences, shelf=shelf)
    return Measured(text.origin, found, tuple(layers))


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


def _model_type(pair: Pair) -> str:
    return str(pair.dense.checkpoint.config.get("model_type"))


def _against_transformers(pair: Pair, sequences: Sequence[Tensor]) -> list[Check]:
    """Load both checkpoints with transformers: keys, equality below index_topk, our graph above it.

    Where no class has the indexer, the dense class reads both, and our graph is held against it below index_topk.
    """
    hf.refuse_if_too_large(pair.sparse.checkpoint)
    dense_class = model_class_of(read_config(pair.dense.checkpoint.config), pair.dense.checkpoint.config)
    target = pair.layout.in_transformers
    name = target.architecture if target is not None else dense_class.__name__
    length = min(pair.config.index_topk, SHORT, len(sequences[0]))
    short = program_inputs(sequences[0][:length])
    sparse_short, faults = hf.loaded_logits(pair.sparse.checkpoint, name, short)
    faults = [fault for fault in faults if not _known_to_be_left_over(pair, fault)]
    what = (
        "no key missing or unexpected" if target is not None else "as the dense model, none but the indexers left over"
    )
    detail = faults[0] if faults else name
    checks = [Check(f"transformers loads it, {what}", not faults, len(faults), 0, detail, CONVERT_AGAIN)]
    if faults:
        return checks
    dense_short, faults = hf.loaded_logits(pair.dense.checkpoint, dense_class.__name__, short)
    if faults := [fault for fault in faults if not fault.startswith("unexpected keys")]:
        return [
            *checks,
            Check("transformers loads the dense model, no key missing", False, len(faults), 0, faults[0], NOT_A_PAIR),
        ]
    checks.append(_equal(pair, dense_short, sparse_short))
    if target is None:
        return [*checks, _dense_parity(pair, sparse_short, short)]
    del dense_short, sparse_short  # each has a head
    length = parity_length(pair.config, [site.dims.num_heads for site in pair.converted.found.sites])
    return checks + _parity(pair, name, [ids[:length] for ids in sequences[:PARITY_SEQUENCES]])


def _known_to_be_left_over(pair: Pair, fault: str) -> bool:
    """Indexers, where the class has none; multi-token-prediction layers, which transformers' DSA classes leave out (it keeps quiet
    about the numbers of the published models only)."""
    if not fault.startswith("unexpected keys"):
        return False
    layer, count = _LAYER.search(fault), pair.sparse.checkpoint.config.get("num_hidden_layers")
    after = layer is not None and isinstance(count, int) and int(layer[1]) >= count
    if is_wrapper(pair.dense.checkpoint.whole_config) and is_other_part(fault.partition(": ")[2]):
        return True
    mtp = after and bool(mtp_tensors(pair.sparse.checkpoint.config, pair.sparse.checkpoint.tensors))
    return mtp or (pair.layout.in_transformers is None and ".indexer." in fault)


def _equal(pair: Pair, dense: Logits, sparse: Logits) -> Check:
    """The gate of a family's rule. logits: of both by transformers."""
    name, limit = "dense = DSA up to index_topk (transformers, bit for bit)", 0.0
    if pair.folded:
        name, limit = "dense = DSA up to index_topk (transformers, folded)", FOLDED_TOLERANCE
    gap = logits_difference(dense, sparse)
    return Check(name, gap <= limit, gap, limit, f"{dense.tokens} tokens", NOT_A_PAIR)


def _dense_parity(pair: Pair, expected: Logits, batch: dict[str, Tensor]) -> Check:
    """Our graph against transformers' dense class, where everything is selected."""
    _, runners = pair.runners()
    on_device = {name: tensor.to(pair.sparse.device) for name, tensor in batch.items()}
    gap = logits_difference(expected, next(runners["dsa"].logits_of([on_device])))
    detail = f"{expected.tokens} tokens"
    return Check(
        "graph = transformers' dense class up to index_topk",
        gap <= TRANSFORMERS_TOLERANCE,
        gap,
        TRANSFORMERS_TOLERANCE,
        detail,
        CLASS_REMEDY,
    )


def parity_length(config: IndexerConfig, heads: Sequence[int]) -> int:
    """Tokens that transformers' model is given at most: it builds scores [heads, tokens, tokens] in float32, two at a time."""
    widest = max(config.index_n_heads, *heads)
    return max(config.index_topk + PARITY_TOKENS, math.isqrt(PARITY_BYTES // (2 * 4 * widest)))


def _parity(pair: Pair, name: str, sequences: Sequence[Tensor]) -> list[Check]:
    """Our graph and transformers above index_topk: the same keys up to rounding, and the same logits over the same keys."""
    _, runners = pair.runners()
    selectors = [
        n.name for n in pair.converted.program.graph.nodes if n.target is torch.ops.mla2dsa.lightning_indexer.default
    ]
    batches = [program_inputs(ids, pair.sparse.device) for ids in sequences]
    logits = runners["dsa"].outputs[0]
    gathered: list[dict[str, Any]] = [{} for _ in batches]
    for seen in runners["dsa"].run(batches, [logits, *selectors], late=True):
        gathered[seen.sequence].update(seen.values)
    with StreamedModel.of(pair.sparse.checkpoint, name) as model:
        results = [
            hf.parity(model, program_inputs(ids), found[logits], [found[name].cpu() for name in selectors])
            for ids, found in zip(sequences, gathered, strict=True)
        ]
    detail = f"{len(sequences)} sequences of {len(sequences[0])} tokens"
    limit, names = (
        TRANSFORMERS_TOLERANCE,
        (f"graph = {name} above index_topk", f"keys selected = {name}'s, up to rounding"),
    )
    worst = [max(values, key=lambda v: (v != v, v)) for values in zip(*results, strict=True)]  # NaN is the worst of all
    return [
        Check(it, value <= limit, value, limit, detail, CLASS_REMEDY) for it, value in zip(names, worst, strict=True)
    ]


def verify_folders(
    dense: Path,
    dsa: Path,
    text: str | None = None,
    *,
    sequences: int | None = None,
    sequence_length: int | None = None,
    max_loss_delta: float | None = None,
    foreign_text: str | None = None,
    gates: Sequence[str] = (),
    long: Settings | None = None,
    skip_transformers: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    drop_stale: bool = False,
    allow_partial: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Verification:
    """Open both folders, read `text` (random tokens without one), run every check, and `long`. gates: NAME=LIMIT. Raises UserError."""
    limits = Verify()
    wanted = read_gates(gates, [*TEXT_GATES, *(gate_names(long) if long is not None else [])])
    sequences = limits.sequences if sequences is None else sequences
    if sequences < 1:
        raise UsageError(f"--sequences {sequences}, expected at least 1")
    limit = _limit(limits, max_loss_delta)
    pair = open_pair(dense, dsa, usable_device(device), drop_stale=drop_stale, allow_partial=allow_partial)
    if not skip_transformers:
        hf.refuse_if_too_large(pair.sparse.checkpoint)
    if long is not None:
        check_lengths(long.lengths, pair.config.index_topk, pair.dense.capture.max_length)
    read = partial(_read, pair, sequences, _length(pair, sequence_length), trust_remote_code)
    main, foreign = read(text), None if foreign_text is None else read(foreign_text)
    result = verify(pair, main.sequences, main.origin, limit, skip_transformers, on_progress, None, decode=main.decode,
                    foreign=foreign, fp8=True, gates=wanted)  # fmt: skip
    del pair
    if long is None:
        return result
    tell = None if on_progress is None else partial(on_progress, "long")
    asked = run_long(dsa, long, device=device, trust_remote_code=trust_remote_code, on_progress=tell)
    return replace(result, long=asked, checks=(*result.checks, *long_checks(asked, wanted)))


def _limit(limits: Verify, max_loss_delta: float | None) -> float:
    """Raises UsageError for what is none."""
    limit = limits.max_loss_delta if max_loss_delta is None else max_loss_delta
    if not 0 < limit < math.inf:
        raise UsageError(f"--max-loss-delta {limit}, expected a number above 0, in nats/token")
    return limit


def _length(pair: Pair, sequence_length: int | None) -> int:
    """Tokens of a sequence. Raises UsageError."""
    topk, context = pair.config.index_topk, pair.dense.capture.max_length
    length = min(context, max(1024, 4 * topk)) if sequence_length is None else sequence_length
    if not topk + 1 < length <= context:
        raise UsageError(
            f"--sequence-length {length}, expected at least index_topk {topk} + 2 and at most the context of {context} tokens"
        )
    return length


def _read(pair: Pair, count: int, length: int, trust_remote_code: bool, path: str | None) -> Text:
    """The text at `path`, or random tokens."""
    checkpoint = pair.dense.checkpoint
    tokens = model_tokens(checkpoint, path, length * count, trust_remote_code=trust_remote_code)
    decode = None if path is None else load_tokenizer(checkpoint.path, trust_remote_code).decode
    return Text(tokens.sequences(length, count), tokens.origin, decode)
