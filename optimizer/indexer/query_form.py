"""A model without a query latent: which way of making one is exact enough, measured on the model's own hidden states.

The identity form puts a norm where there is none: it multiplies a token's query by s = 1 / sqrt(mean(u^2) + eps), u the hidden
state without its gain, which is 1 but for the epsilon. Small residual streams (layer 0, after small embeddings) are far off.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...errors import UserError
from ...exporters.dsa.families import OWN
from ...exporters.dsa.layout import Layout
from ...kernels.spec import IndexerConfig
from ..model.weights import WeightSource
from .calibrate import Calibration, layer_samples

# Fixed by what the verification allows, GRAPH_TOLERANCE and FOLDED_TOLERANCE: half of that, for softmax makes more of it in the outputs
# (random weights like Moonlight's: 7.4e-6 here, 1.1e-5 there). Relative, of all layers' queries together.
IDENTITY_LIMIT = 5e-6
_CLASS_EPS = 1e-6  # fixed by transformers' DSA classes: of q_a_layernorm; vLLM takes rms_norm_eps


def settle(layout: Layout, source: WeightSource, sequence: Tensor, config: IndexerConfig, asked: str) -> Layout:
    """`layout` with one way left. sequence: [L] token ids, L > index_topk; asked: as --layout.

    Where none is left and nothing else was asked for, the own layout. Raises UserError when something was.
    """
    if "identity" not in layout.forms:
        return layout
    name, error = _measured(source, sequence, config)
    if error <= IDENTITY_LIMIT:
        return replace(
            layout.settled("identity"), why=f"{layout.why}; the identity as query latent, {error:.1e} off in all"
        )
    off = f"the identity as query latent is {error:.1e} off up to {name}, {IDENTITY_LIMIT:.0e} is allowed"
    if "bias" in layout.forms:
        why = f"{layout.why}; query latent by biases, which transformers alone reads, since {off}"
        return replace(layout.settled("bias"), why=why)
    assert layout.family is not None
    other = "the query projection is quantised" if "bias" in layout.family.query_forms else "biases are not read there"
    why = f"{off}, and {other}, so that no other can be made"
    if asked != "auto":
        raise UserError(f"--layout {asked}: {why}; pass --layout own, or auto")
    return Layout(OWN, why, mtp=layout.mtp)


def _measured(source: WeightSource, sequence: Tensor, config: IndexerConfig) -> tuple[str, float]:
    """(layer, how far queries are off up to it, layers added up): the last layer, or the first that is too much."""
    eps = max(_CLASS_EPS, float(source.checkpoint.config.get("rms_norm_eps", _CLASS_EPS)))
    name, total = "", 0.0
    for site, samples, _ in layer_samples(source, [sequence], Calibration(config, rows=1)):
        gain = source.checkpoint.load(f"{site.name.removesuffix('.self_attn')}.input_layernorm.weight", torch.float32)
        name, total = site.name, total + identity_error(samples[0].hidden, gain.to(samples[0].hidden.device), eps)
        if total > IDENTITY_LIMIT:
            break
    return name, total


def identity_error(hidden: Tensor, gain: Tensor, eps: float) -> float:
    """The most by which the identity form scales a token's query. hidden: [L, D], what q_proj reads; gain: [D] of its norm."""
    square = (hidden.double() / gain.double()).pow(2).mean(-1)
    error = float(((square + eps).rsqrt() - 1).abs().max())
    return error if error == error else float("inf")  # a gain of 0 leaves nothing to divide by
