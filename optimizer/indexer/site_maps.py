"""Read the linear maps of an MLA site off the graph, by running pieces of it on tags and unit vectors.

No weight is looked for by name: which row of which projection becomes which channel, what the latent norm multiplies,
and how rotary channels pair up, is what the graph does to the probes. `check_maps` then holds the maps against the
dense model's own queries and keys, so a misreading cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from ...compat import torch_private
from ...errors import UserError
from ...passes.graph.graph_eval import (
    CannotEvaluate,
    ancestors,
    concrete_shape,
    evaluate,
    linear_parts,
    node_symbols,
    shape,
    value,
)
from ...passes.matching.sites import MlaSite
from .indexer_math import rotate
from .samples import SiteMaps, SiteSample

NameOf = Mapping[str, str]
Load = Callable[[str], Tensor]

# benchmarks/constants.py: from 100 on the gains that are read are exact in float32, with 10 they are 4e-7 off.
_UNIT = 1e4  # large enough for the norm's epsilon to vanish
# Fixed by float64's rounding: epsilons down to 1e-16 are read to three digits.
_SMALL = 1e-3  # small enough for the epsilon to be seen
# benchmarks/constants.py: on tiny-mla one row is enough to see each fault.
CHECKED_ROWS = 4  # query rows a map is held against, spread over the sequence: some models scale far queries
# benchmarks/constants.py: good maps pass from 1e-6 on, a gain 1% off and a row off by its last bit from 1e-2 on.
TOLERANCE = 1e-3  # of the largest value; float32 graphs agree to 1e-6
# Fixed by float64's rounding: what a norm puts outside of its diagonal.
ROUND_OFF = 1e-9  # of the largest entry


def read_maps(site: MlaSite, names: NameOf, load: Load) -> SiteMaps:
    """The maps of `site`. names: placeholder -> parameter name; load: a parameter's values by name.

    Raises UserError when the query or the latent is not a linear map of its input in the way the closed form needs.
    """
    try:
        return _read(site, names, load)
    except (CannotEvaluate, RuntimeError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise UserError(
            f"{site.name}: its projections cannot be read off the graph ({reason}); use --indexer donor:PATH"
        ) from error


def _read(site: MlaSite, names: NameOf, load: Load) -> SiteMaps:
    dims = site.dims
    if site.q_b is None:
        raise CannotEvaluate("the query is not one projection's output")
    q_rows, q_factor = _query_rows(site)
    w_q, q_bias = _linear(site.q_b, names, load)
    if q_bias is not None:
        raise CannotEvaluate("the query's projection has a bias, which the indexer has no place for")
    w_q = w_q[q_rows.flatten()].view(*q_rows.shape, -1)
    w_q = w_q * q_factor.to(w_q)[..., None]
    nope = slice(dims.qk_rope_head_dim, None) if site.rope_first else slice(0, dims.qk_nope_head_dim)
    rope = slice(0, dims.qk_rope_head_dim) if site.rope_first else slice(dims.qk_nope_head_dim, None)
    w_uk = load(names[site.kv_b_weight.name]).float()[site.uk_rows.flatten()].view(*site.uk_rows.shape, -1)
    w_kv_a, bias = _linear(site.kv_a, names, load)
    latent_rows, gain, eps = _latent_rows(site, names, load)
    order = torch.tensor(rope_order(site))
    k_rope_rows = torch.tensor(site.k_pe_rows)[order]
    return SiteMaps(
        scale=site.core.scale,
        q_absorbed=torch.einsum("hnr,hnq->hrq", w_uk, w_q[:, nope]),
        q_rope=w_q[:, rope][:, order],
        latent=w_kv_a[latent_rows],
        latent_gain=gain.to(w_kv_a),
        k_rope=w_kv_a[k_rope_rows],
        latent_bias=None if bias is None else bias[latent_rows],
        k_rope_bias=None if bias is None else bias[k_rope_rows],
        latent_eps=eps,
    )


def rope_order(site: MlaSite) -> list[int]:
    """k_pe's channels in half-split order: the first of each pair by frequency, then the second."""
    if site.rope is None:
        return list(range(site.dims.qk_rope_head_dim))
    return [a for a, _ in site.rope.pairs] + [b for _, b in site.rope.pairs]


def _linear(projection: Node, names: NameOf, load: Load) -> tuple[Tensor, Tensor | None]:
    """Weight and bias."""
    _, weight, bias = linear_parts(projection)  # type: ignore[misc]
    return _value(weight, names, load), None if bias is None else _value(bias, names, load)


def _value(node: Node, names: NameOf, load: Load) -> Tensor:
    while node.op != "placeholder":
        node = node.all_input_nodes[0]
    return load(names[node.name]).float()


def _query_rows(site: MlaSite) -> tuple[Tensor, Tensor]:
    """([H, qk_head_dim] row numbers of q_b, [H, qk_head_dim] constant factors) before rotation, for one token at 0."""
    width = int(shape(site.q_b)[-1])  # type: ignore[arg-type]
    ones = _query(site, torch.ones(width, dtype=torch.float64))
    tags = _query(site, torch.arange(1, width + 1, dtype=torch.float64))
    rows = (tags / ones).round()
    if not torch.allclose(rows * ones, tags) or int(rows.min()) < 1 or int(rows.max()) > width:
        raise CannotEvaluate("the query is not a selection of its projection's rows")
    return rows.long() - 1, ones.float()


def _query(site: MlaSite, source: Tensor) -> Tensor:
    tables = [] if site.rope is None else [site.rope.cos, site.rope.sin]
    assert site.q_b is not None
    cone = ancestors(site.core.q, stop=lambda n: n is site.q_b or n in tables)
    env = dict.fromkeys(node_symbols([*cone, site.q_b, *tables]), 1)
    feed: dict[Node, Tensor] = {site.q_b: source.view(concrete_shape(site.q_b, env))}
    for node in cone:  # positions, where a model scales queries by them: the first one
        if (
            node.op == "placeholder"
            and node not in feed
            and isinstance(value(node), Tensor)
            and not value(node).is_floating_point()
        ):
            feed[node] = torch.zeros(concrete_shape(node, env), dtype=value(node).dtype)
    if site.rope is not None:
        blank = torch.zeros(concrete_shape(site.rope.cos, env), dtype=torch.float64)
        feed |= {site.rope.cos: blank + 1, site.rope.sin: blank}
        if site.rope.complex_table:
            feed[site.rope.cos] = torch.complex(blank + 1, blank)
    query: Tensor = evaluate([site.core.q], feed, env)[0]
    return query[0, :, 0]


def _latent_rows(site: MlaSite, names: NameOf, load: Load) -> tuple[Tensor, Tensor, float]:
    """([R] row numbers of kv_a, [R] gains, epsilon): unit vectors through the latent norm come out as gain * sqrt(R), small ones as
    less by what epsilon is beside them."""
    width, rank = int(shape(site.kv_a)[-1]), site.dims.kv_lora_rank
    cone = ancestors(site.latent, stop=lambda n: n is site.kv_a)
    env = dict.fromkeys(node_symbols([*cone, site.kv_a]), width)
    batch = [s for s in shape(site.kv_a)[:1] if isinstance(s, torch.SymInt)]
    env |= {symbol: 1 for size in batch for symbol in torch_private.expression(size).free_symbols}
    units = torch.eye(width, dtype=torch.float64).view(concrete_shape(site.kv_a, env))
    feed = {
        node: load(names[node.name]).double().cpu() for node in cone if node.op == "placeholder" and node.name in names
    }

    def normed(size: float) -> Tensor:
        out: Tensor = evaluate([site.latent], {**feed, site.kv_a: units * size}, env)[0]
        return out.reshape(width, rank)

    out = normed(_UNIT)
    rows = out.abs().argmax(0)
    picked = out[rows, torch.arange(rank)]
    rest = out.clone()
    rest[rows, torch.arange(rank)] = 0
    if bool((rest.abs() > ROUND_OFF * picked.abs().max()).any()) or len(set(rows.tolist())) != rank:
        raise CannotEvaluate("the latent is not an RMS norm of the projection's rows")
    most = int(picked.abs().argmax())
    less = float(picked[most] / normed(_SMALL)[rows[most], most])
    return rows, picked / rank**0.5, max(0.0, (less**2 - 1) * _SMALL**2 / rank)


def check_maps(site: MlaSite, maps: SiteMaps, sample: SiteSample) -> None:
    """Raises UserError unless the maps reproduce the dense model's queries and keys on `sample`."""
    rank, order = site.dims.kv_lora_rank, rope_order(site)
    rows = sample.rows[torch.linspace(0, len(sample.rows) - 1, CHECKED_ROWS).long().unique()]  # the last one included
    at = torch.isin(sample.rows, rows)
    absorbed = torch.einsum("hrq,tq->thr", maps.q_absorbed, sample.q_resid[rows])
    q_rope = torch.einsum("hdq,tq->thd", maps.q_rope, sample.q_resid[rows])
    raw = maps.raw_latent(sample.hidden)
    latent = maps.latent_gain * raw * maps.latent_norm(raw)[:, None]
    k_rope = maps.raw_k_rope(sample.hidden)
    if site.rope is not None:
        q_rope = rotate(q_rope, sample.cos[rows][:, None], sample.sin[rows][:, None])
        k_rope = rotate(k_rope, sample.cos, sample.sin)
    pairs = (
        ("query", absorbed, sample.query[at][..., :rank]),
        ("rotary query", q_rope, sample.query[at][..., rank:][..., order]),
        ("latent", latent, sample.key[:, :rank]),
        ("rotary key", k_rope, sample.key[:, rank:][:, order]),
    )
    for what, got, expected in pairs:
        if not float((got - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
            raise UserError(
                f"{site.name}: the {what} read off the graph is not what the dense model computes; use --indexer donor:PATH"
            )
