"""compare: a correct rewrite passes, and of a wrong one the first layer that differs is named."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import families
import pytest
import torch
from saved import opened, saved, tensors
from torch import Tensor
from torch.export import ExportedProgram

from mla2dsa.errors import UserError
from mla2dsa.kernels.spec import IndexerConfig
from mla2dsa.optimizer.proof.check import Difference, NumericCheck, compare, difference
from mla2dsa.passes.mla_to_dsa import Converted, mla_to_dsa

LAYERS = 3
CONFIG = IndexerConfig(index_topk=32, index_n_heads=4, index_head_dim=16)
SHAPES = [(1, 1, 0), (2, 20, 6), (1, 32, 0)]  # batch, length <= index_topk, left padding of the first row


@dataclass(frozen=True)
class Rewrite:
    dense: ExportedProgram
    converted: Converted

    @property
    def layers(self) -> list[tuple[str, str, str]]:
        return [(change.name, change.before, change.after) for change in self.converted.changes]

    def compare(self, after: ExportedProgram, sequences: list[dict[str, Tensor]]) -> NumericCheck:
        return compare(self.dense, after, sequences, self.layers, tolerance=1e-5)

    def damaged(self, name: str, factor: float) -> ExportedProgram:
        """The converted program with one value of one of its tensors multiplied."""
        program = copy.copy(self.converted.program)
        held = dict(program.state_dict)
        held[name] = torch.nn.Parameter(held[name].detach().clone(), requires_grad=False)
        held[name].view(-1)[0] *= factor
        program._state_dict = held
        return program


@pytest.fixture(scope="module")
def rewrite() -> Rewrite:
    dense = families.export(families.build("deepseek_v3", num_hidden_layers=LAYERS))
    names = [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
    return Rewrite(dense, mla_to_dsa(dense, CONFIG, {n: families.indexer_weights(CONFIG, 64, 48) for n in names}))


def batches(*shapes: tuple[int, int, int]) -> list[dict[str, Tensor]]:
    return [tensors(families.inputs(*shape, seed=seed)) for seed, shape in enumerate(shapes)]


def test_a_correct_rewrite_passes_in_every_layer(rewrite: Rewrite) -> None:
    check = rewrite.compare(rewrite.converted.program, batches(*SHAPES))
    assert check.first_bad is None
    assert [d.name for d in check.differences] == [f"model.layers.{i}.self_attn" for i in range(LAYERS)] + ["outputs"]
    assert 0 < check.worst <= 1e-5


def test_a_program_equals_itself(rewrite: Rewrite) -> None:
    cores = [(name, old, old) for name, old, _ in rewrite.layers]
    check = compare(rewrite.dense, rewrite.dense, batches(*SHAPES), cores, tolerance=0.0)
    assert check.worst == 0.0
    assert check.first_bad is None


def test_what_is_nowhere_computed_alike_is_no_equality(rewrite: Rewrite) -> None:
    """A layer whose node the other graph has in another piece would be compared with nothing."""
    (name, old, new), *between, (last, last_old, last_new) = rewrite.layers
    crossed = [(name, old, last_new), *between, (last, last_old, new)]
    with pytest.raises(UserError, match=f"^{name}: the two graphs compute it in different pieces"):
        compare(rewrite.dense, rewrite.converted.program, batches(*SHAPES), crossed, 1e-5)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("weight", ["kv_b_proj", "kv_a_proj_with_mqa", "q_a_proj"])
def test_the_first_layer_that_differs_is_named(rewrite: Rewrite, layer: int, weight: str) -> None:
    name = f"model.layers.{layer}.self_attn"
    check = rewrite.compare(rewrite.damaged(f"{name}.{weight}.weight", 30.0), batches(*SHAPES))
    assert check.first_bad is not None
    assert check.first_bad.name == name
    assert check.first_bad.relative > 1e-3
    assert all(d.relative <= 1e-5 for d in check.differences[:layer])


def test_a_difference_outside_attention_shows_in_the_outputs(rewrite: Rewrite) -> None:
    check = rewrite.compare(rewrite.damaged("lm_head.weight", 30.0), batches(*SHAPES))
    assert check.first_bad is not None
    assert check.first_bad.name == "outputs"


def test_too_many_keys_for_the_top_k_show(rewrite: Rewrite) -> None:
    check = rewrite.compare(rewrite.converted.program, batches((1, CONFIG.index_topk + 8, 0)))
    assert check.first_bad is not None
    assert check.first_bad.name == "model.layers.0.self_attn"


@pytest.mark.parametrize("layer", range(LAYERS))
def test_nan_never_passes(rewrite: Rewrite, layer: int) -> None:
    name = f"model.layers.{layer}.self_attn"
    check = rewrite.compare(rewrite.damaged(f"{name}.kv_b_proj.weight", float("nan")), batches(*SHAPES))
    assert check.first_bad is not None
    assert check.first_bad.name == name
    assert check.first_bad.nans[0] == 0 < check.first_bad.nans[1]
    assert check.worst != check.worst


def test_only_the_last_sequence_differs(rewrite: Rewrite) -> None:
    """A maximum over all sequences, not the last one's or the first one's."""
    short, long = batches((1, 20, 0), (1, CONFIG.index_topk + 8, 0))
    assert rewrite.compare(rewrite.converted.program, [short, long]).first_bad is not None
    assert rewrite.compare(rewrite.converted.program, [long, short]).first_bad is not None


def test_streamed_from_a_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = opened(saved("deepseek_v3", tmp_path_factory))
    dense = source.capture.program
    converted = mla_to_dsa(dense, CONFIG)
    load = source.loader(converted.program)

    def with_indexers(name: str) -> Tensor:
        if ".indexer." in name:
            return torch.ones(converted.program.state_dict[name].shape)
        return load(name)

    layers = [(change.name, change.before, change.after) for change in converted.changes]
    check = compare(dense, converted.program, batches(*SHAPES), layers, 1e-5, source.loader(dense), with_indexers)
    assert check.first_bad is None


# Padding


def relative(a: Tensor, b: Tensor, mask: Tensor | None = None, token_axis: int = 1) -> float:
    return difference("layer", a, b, mask, token_axis).relative


def test_padded_positions_are_not_compared() -> None:
    a = torch.randn(2, 5, 3)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[0, :2] = 0
    b = a.clone()
    b[0, :2] = float("nan")
    assert relative(a, b, mask) == 0.0
    b[0, 2, 0] += 1.0
    assert relative(a, b, mask) == pytest.approx(1 / float(a[mask.bool()].abs().max()))


def test_token_axis_of_attention_outputs() -> None:
    a = torch.randn(2, 4, 5, 3)  # batch, heads, tokens, channels
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 4] = 0
    b = a.clone()
    b[1, :, 4] += 1.0
    assert relative(a, b, mask, token_axis=2) == 0.0
    b[1, 3, 3] += 1.0
    assert relative(a, b, mask, token_axis=2) > 0


def test_without_a_mask_every_position_counts() -> None:
    a, b = torch.ones(1, 3, 2), torch.ones(1, 3, 2)
    b[0, 2, 1] = 1.5
    assert relative(a, b) == 0.5
    assert relative(a, b, torch.ones(1, 3)) == 0.5


# The result


@pytest.mark.parametrize("side", [0, 1, 2], ids=["before", "after", "both"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_values_that_are_not_finite_are_counted_and_never_equal(bad: float, side: int) -> None:
    a, b = torch.ones(1, 2, 2), torch.ones(1, 2, 2)
    for at in {0: [a], 1: [b], 2: [a, b]}[side]:
        at[0, 0, 0] = at[0, 1, 1] = bad
    found = difference("layer", a, b)
    counts = (2 * (side != 1), 2 * (side != 0))
    assert (found.nans, found.infinities) == ((counts, (0, 0)) if bad != bad else ((0, 0), counts))
    assert not found.relative <= 1e9
    what = "NaN" if bad != bad else "infinite"
    assert str(found) == f"layer ({counts[0]} {what} values before and {counts[1]} after)"
    assert NumericCheck((found,), 1e9).first_bad is found


def test_what_is_not_finite_is_counted_over_all_sequences() -> None:
    first, second = Difference("a", 0.5, (1, 2), (0, 3)), Difference("a", float("nan"), (10, 0), (5, 0))
    assert (first.joined(second).nans, first.joined(second).infinities) == ((11, 2), (5, 3))
    assert first.joined(second).relative != first.joined(second).relative
    assert second.joined(first).relative != second.joined(first).relative
    assert str(Difference("a", 0.5)) == "a"


def test_nothing_but_zeros_equals_only_zeros() -> None:
    zeros = torch.zeros(1, 2, 2)
    assert relative(zeros, zeros) == 0.0
    assert relative(zeros, zeros + 1e-9) > 1e9


@pytest.mark.parametrize("values", [[0.1, float("nan"), 0.2], [float("nan"), 0.1], [0.1, float("nan")]])
def test_worst_keeps_nan(values: list[float]) -> None:
    check = NumericCheck(tuple(Difference(str(i), value) for i, value in enumerate(values)), 0.5)
    assert check.worst != check.worst
    assert check.first_bad is not None


def test_first_bad_is_the_first_in_graph_order() -> None:
    found = (Difference("a", 0.1), Difference("b", 0.6), Difference("c", 0.9))
    assert NumericCheck(found, 0.5).first_bad == found[1]
    assert NumericCheck(found, 0.9).first_bad is None
    assert NumericCheck(found, 0.9).worst == 0.9
