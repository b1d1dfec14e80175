"""LayoutProver: layers that move their data alike are proved once, those that do not are not taken for each other."""

from __future__ import annotations

import pytest
import torch
from handwritten import Dims, Mla, build, export
from mla_variants import ChannelsFirst, PartsFirst, PeFirst, RepeatedKPe, ShiftedHeads
from torch import Tensor, nn

from mla2dsa.passes.matching import layout
from mla2dsa.passes.matching.sites import MlaSite
from mla2dsa.passes.mla_to_dsa import prepare


class Layers(nn.Module):
    """x + self_attn(x) of each in turn."""

    def __init__(self, attentions: list[type[Mla]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([build(attention) for attention in attentions])
        self.self_attn = self.layers[0].self_attn  # what `inputs` looks at

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask, pos)
        return x


def sites(model: nn.Module) -> tuple[MlaSite, ...]:
    found = prepare(export(model))[1]  # type: ignore[arg-type]
    assert not found.misses
    return found.sites


@pytest.mark.parametrize(
    "other", [ShiftedHeads, ChannelsFirst, PartsFirst, PeFirst, RepeatedKPe], ids=lambda a: a.__name__
)
def test_each_layer_has_its_own_layout(other: type[Mla], monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[str] = []
    prove = layout.prove_layout
    monkeypatch.setattr(
        layout,
        "prove_layout",
        lambda core, behind: proved.append(core.out.name) or prove(core, behind),  # type: ignore[func-returns-value]
    )
    alone = {kind: sites(build(kind))[0] for kind in (Mla, other)}
    kinds = [Mla, other, Mla, other, Mla]
    del proved[:]
    found = sites(Layers(kinds))
    assert len(proved) == 2
    for kind, site in zip(kinds, found, strict=True):
        wanted = alone[kind]
        assert torch.equal(site.uk_rows, wanted.uk_rows)
        assert torch.equal(site.uv_rows, wanted.uv_rows)
        assert site.rope_first == wanted.rope_first


def test_layers_of_other_widths_are_proved_each(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Layers([Mla, Mla]).double()
    wide = Mla(Dims(heads=2, nope=16)).double().eval().requires_grad_(False)
    model.layers[1].self_attn = wide
    first, second = sites(model)
    assert (first.dims.num_heads, second.dims.num_heads) == (4, 2)
    assert first.uk_rows.shape == (4, 8)
    assert second.uk_rows.shape == (2, 16)
