"""tap: what it exposes equals what the model itself computes, seen through hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, exported, inputs
from handwritten import Dims, Mla, Model, NoPe, build, export
from handwritten import inputs as handwritten_inputs
from refused_variants import Sliding3
from torch import Tensor, nn
from torch.export import ExportedProgram

from mla2dsa.errors import UserError
from mla2dsa.passes.tap import ROWS_INPUT, SITE_TAPS, TABLE_TAPS, tap

SITES = FAMILIES["deepseek_v3"].sites
ROWS = torch.tensor([6, 0, 20, 13])
BATCH, LENGTH, PADDING = 3, 21, 4
KWARGS = inputs(BATCH, LENGTH, PADDING)
REAL = KWARGS["attention_mask"].bool()
Seen = dict[str, Tensor]


def seen_by_hooks(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Seen]]:
    """(logits, per layer: hidden, q_resid, latent, and the q, k, v, mask, scale and output of its attention)."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    seen: dict[str, Seen] = {site: {} for site in SITES}
    handles = []
    for site in SITES:
        attention = model.get_submodule(site)
        for part, name in (("kv_a_proj_with_mqa", "hidden"), ("q_b_proj", "q_resid"), ("kv_b_proj", "latent")):

            def keep(_: nn.Module, args: tuple[Tensor], at: Seen = seen[site], name: str = name) -> None:
                at[name] = args[0]

            handles.append(attention.get_submodule(part).register_forward_pre_hook(keep))

    def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
        scores = query @ key.transpose(2, 3) * scaling
        hidden = ~mask if mask.dtype == torch.bool else mask < 0
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        at = seen[SITES[module.layer_idx]]
        at.update(scores=scores, weights=weights, attention=weights @ value)
        return at["attention"].transpose(1, 2).contiguous(), weights

    def table(_: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> None:
        for site in SITES:
            seen[site].update(cos=out[0], sin=out[1])

    handles.append(model.model.rotary_emb.register_forward_hook(table))
    monkeypatch.setattr(modeling, "eager_attention_forward", eager)
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    with torch.no_grad():
        logits = model(**KWARGS).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def run(program: ExportedProgram, rows: Tensor = ROWS) -> tuple[Any, dict[str, Tensor]]:
    tapped = tap(program, rows.numel())
    with torch.no_grad():
        outputs, taps = tapped.program.module()(**KWARGS, **{ROWS_INPUT: rows})
    assert set(taps) == set(tapped.taps)
    return outputs, taps


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_taps_equal_what_the_model_computes(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, program = exported("deepseek_v3", attention)
    outputs, taps = run(program)
    with torch.no_grad():
        own = model(**KWARGS).logits
    torch.testing.assert_close(outputs.logits[REAL], own[REAL], rtol=0, atol=1e-6)
    expected, seen = seen_by_hooks(model, monkeypatch)
    torch.testing.assert_close(outputs.logits[REAL], expected[REAL], rtol=0, atol=2e-5)
    scale = model.model.layers[0].self_attn.scaling
    rows_real = REAL[:, ROWS]
    pairs = rows_real[:, :, None] & REAL[:, None, :]  # what padded tokens become is unspecified
    for site in SITES:
        at, got = seen[site], {name: taps[f"{site}.{name}"] for name in (*SITE_TAPS, *TABLE_TAPS)}

        def close(name: str, value: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
            torch.testing.assert_close(value, want, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")

        close("hidden", got["hidden"][REAL], at["hidden"][REAL])
        close("q_resid", got["q_resid"][REAL], at["q_resid"][REAL])
        close("latent", got["key"][REAL][:, : at["latent"].shape[-1]], at["latent"].squeeze(1)[REAL])
        close("attention", got["attention"].transpose(1, 2)[REAL], at["attention"].transpose(1, 2)[REAL])
        scores = torch.einsum("brhd,bsd->brsh", got["query"], got["key"]) * scale
        wanted = at["scores"][:, :, ROWS].permute(0, 2, 3, 1)
        close("query . key", scores[pairs], wanted[pairs], 1e-4)
        close("mass", got["mass"][rows_real], at["weights"].mean(1)[:, ROWS][rows_real])
        half = at["cos"].shape[-1] // 2
        close("cos", got["cos"].expand(BATCH, -1, -1), at["cos"][..., :half].expand(BATCH, -1, -1), 0)
        close("sin", got["sin"].expand(BATCH, -1, -1), at["sin"][..., :half].expand(BATCH, -1, -1), 0)


def test_shapes_are_those_of_the_docstring() -> None:
    config = exported("deepseek_v3", "sdpa")[0].config
    taps = run(exported("deepseek_v3", "sdpa")[1])[1]
    row = config.kv_lora_rank + config.qk_rope_head_dim
    shapes = {
        "hidden": (BATCH, LENGTH, config.hidden_size),
        "q_resid": (BATCH, LENGTH, config.q_lora_rank),
        "query": (BATCH, ROWS.numel(), config.num_attention_heads, row),
        "key": (BATCH, LENGTH, row),
        "mass": (BATCH, ROWS.numel(), LENGTH),
        "attention": (BATCH, config.num_attention_heads, LENGTH, config.v_head_dim),
        "cos": (BATCH, LENGTH, config.qk_rope_head_dim // 2),
        "sin": (BATCH, LENGTH, config.qk_rope_head_dim // 2),
    }
    assert {k: tuple(v.shape) for k, v in taps.items()} == {f"{s}.{k}": v for s in SITES for k, v in shapes.items()}


def test_mass_is_a_distribution_over_the_real_past() -> None:
    mass = run(exported("deepseek_v3", "eager")[1])[1][f"{SITES[0]}.mass"]
    torch.testing.assert_close(mass.sum(-1)[REAL[:, ROWS]], torch.ones(int(REAL[:, ROWS].sum())))
    future = torch.arange(LENGTH)[None] > ROWS[:, None]
    assert not mass[:, future].any()
    assert not mass[0, :, :PADDING].any()


def test_a_site_without_rope_has_no_table_and_the_hidden_state_stands_in_for_a_missing_query_latent() -> None:
    model = build(NoPe)
    tapped = tap(export(model), 2)
    assert set(tapped.taps) == {f"self_attn.{name}" for name in SITE_TAPS}
    args = handwritten_inputs(model, 2, 9)
    outputs, taps = tapped.program.module()(*args, tap_rows=torch.tensor([3, 8]))
    torch.testing.assert_close(outputs, model(*args))
    assert taps["self_attn.mass"].dtype == torch.float64
    _, program = exported("deepseek_v2-lite", "sdpa")
    taps = run(program)[1]
    assert torch.equal(taps[f"{SITES[0]}.q_resid"], taps[f"{SITES[0]}.hidden"])


def test_the_original_program_is_untouched() -> None:
    program = exported("deepseek_v3", "sdpa")[1]
    before = [node.format_node() for node in program.graph.nodes], str(program.graph_signature)
    tap(program, 4)
    assert before == ([node.format_node() for node in program.graph.nodes], str(program.graph_signature))


def test_another_number_of_rows_is_refused() -> None:
    program = tap(exported("deepseek_v3", "sdpa")[1], 4).program
    with pytest.raises(Exception, match="tap_rows"):
        program.module()(**KWARGS, tap_rows=torch.arange(5))


class Two(Model):
    def __init__(self, first: type[Mla], second: type[Mla]) -> None:
        super().__init__(first(Dims()))
        self.second = second(Dims())

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return x + self.second(super().forward(x, mask, pos), mask, pos)  # type: ignore[no-any-return]


def test_misses_are_refused_unless_allowed() -> None:
    program = export(Two(Mla, Sliding3).eval().double().requires_grad_(False))
    with pytest.raises(UserError, match="second: the mask is not causal"):
        tap(program, 4)
    assert set(tap(program, 4, allow_partial=True).taps) == {f"self_attn.{n}" for n in (*SITE_TAPS, *TABLE_TAPS)}


def test_a_module_called_twice_is_refused() -> None:
    class Twice(Model):
        def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
            return super().forward(super().forward(x, mask, pos), mask, pos)

    with pytest.raises(UserError, match="self_attn is called twice"):
        tap(export(Twice(build(Mla).self_attn)), 4)
