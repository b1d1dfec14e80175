"""Every MLA family of transformers, captured three ways: all its MLA layers are found, and the rewrite equals the dense model.

What cannot be exported, or must not be converted, is listed here with its reason.
"""

from __future__ import annotations

import pytest
from comparing import close
from families import DENSE, FAMILIES, MAX_LENGTH, SPARSE, build, export, exported, indexer_weights, inputs, logits

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.model.capture import capture
from mla2dsa.passes.mla_to_dsa import mla_to_dsa

CONFIG = IndexerConfig(index_topk=MAX_LENGTH, index_n_heads=4, index_head_dim=16)


# Linear attention takes long to trace, and its MLA layers are as any other's: one way in for each hybrid.
WAYS = {"kimi_linear": ("sdpa",), "bailing_hybrid": ("anchor",)}


@pytest.mark.parametrize(
    ("name", "attention"), [(name, way) for name in DENSE for way in WAYS.get(name, ("sdpa", "eager", "anchor"))]
)
def test_a_family_converts(name: str, attention: str) -> None:
    family = FAMILIES[name]
    model, program = exported(name, attention)
    width = model.config.q_lora_rank if family.q_latent else model.config.hidden_size
    weights = {site: indexer_weights(CONFIG, model.config.hidden_size, width) for site in family.sites}
    converted = mla_to_dsa(program, CONFIG, weights)
    assert not converted.found.misses  # a hybrid's linear attention has no softmax: nothing to miss
    assert tuple(site.name for site in converted.found.sites) == family.sites
    assert not converted.functionalised
    for site in converted.found.sites:
        assert (site.q_resid is not None, site.rope is not None) == (family.q_latent, family.rope)
        assert site.padding is not None
        assert site.padding.name == "attention_mask"
    kwargs = inputs(3, 21, padding=4)
    dense, sparse = logits(model, kwargs), logits(converted.program.module(), kwargs)
    close(sparse, dense, of_max=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SPARSE)
def test_an_already_sparse_model_is_refused(name: str, attention: str) -> None:
    """Its mask comes from its own indexer."""
    program = export(build(name, attention), named_dims=False, length=31)
    reason = r"no dense MLA .*self_attn: the mask depends on activations or weights \(\w+indexer\w+\): already sparse"
    with pytest.raises(UserError, match=reason):
        mla_to_dsa(program, CONFIG)


@pytest.mark.parametrize("name", SPARSE)
def test_an_already_sparse_model_is_refused_at_capture(name: str) -> None:
    """The anchor would lose the selected indices."""
    with pytest.raises(UserError, match=r"Attention gives its attention indices: not plain dense attention"):
        capture(build(name, device="meta").config.to_dict())


# What transformers 5.23 does not export, whatever we do, and why. When one of these stops failing, the table can shrink.
GUARD = r"Could not guard on data-dependent expression"
NOT_EXPORTABLE = {
    "kimi_linear with bounded dims": (("kimi_linear", "sdpa"), r"Constraints violated \(seq\)"),  # pads to chunks of 64
    "deepseek_v32 with bounded dims": (
        ("deepseek_v32", "sdpa"),
        r"Constraints violated \(seq\)",
    ),  # min(index_topk, seq)
    "glm_moe_dsa with bounded dims": (("glm_moe_dsa", "sdpa"), r"Constraints violated \(seq\)"),  # likewise
    "flex_attention": (("deepseek_v3", "flex_attention"), GUARD),  # asks whether the padding mask is all ones
    "experts as a loop": (("deepseek_v3", "sdpa", "eager"), GUARD),  # `for expert in hit`
}


@pytest.mark.parametrize("case", NOT_EXPORTABLE)
def test_what_transformers_does_not_export(case: str) -> None:
    (name, attention, *experts), why = NOT_EXPORTABLE[case]
    model = build(name, attention)
    if experts:
        model.set_experts_implementation(experts[0])  # type: ignore[operator]
    with pytest.raises(Exception, match=why):
        export(model, named_dims=True)
