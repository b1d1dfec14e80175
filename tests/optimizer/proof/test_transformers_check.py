"""Comparing with transformers over equal selections: ours are taken, and held against its own scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from mla2dsa.errors import UserError
from mla2dsa.exporters.dsa.names import UNPROVEN_CONFIG
from mla2dsa.optimizer.model.checkpoint import Checkpoint
from mla2dsa.optimizer.proof.transformers_check import (
    SameSelection,
    loaded_logits,
    logits,
    lowest_slot_ties,
    parity,
    refuse_if_too_large,
)
from mla2dsa.runtime.logits import Logits

NEVER = -torch.inf
GENERATION, INDEX = "generation_config.json", "model.safetensors.index.json"


def causal(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), NEVER)


def selection(rows: list[list[int]]) -> Tensor:
    return torch.tensor([rows], dtype=torch.int32)


SCORES = causal(torch.tensor([[[1.0, 0, 0, 0], [4, 2, 0, 0], [5, 3, 2.9999, 0], [8, 1, 2, 0.5]]]))
BEST = selection([[0, -1], [0, 1], [0, 1], [0, 2]])


@pytest.mark.parametrize(
    ("ours", "shortfall"),
    [
        (BEST, 0.0),
        (selection([[0, -1], [0, 1], [0, 2], [0, 2]]), 0.0001 / 5),  # all but a tie
        (selection([[0, -1], [0, 1], [0, 1], [0, 3]]), 1.5 / 8),  # a wrong key
        (selection([[0, -1], [0, 1], [0, 1], [0, -1]]), torch.inf),
        (selection([[0, -1], [1, -1], [0, 1], [0, 2]]), torch.inf),
    ],
    ids=["same", "near-tie", "wrong", "fewer", "fewer-of-few"],
)
def test_shortfall(ours: Tensor, shortfall: float) -> None:
    selection = SameSelection([ours])
    with selection.taken():
        taken = SCORES.topk(2, dim=-1).indices
    assert selection.shortfall == pytest.approx(shortfall, abs=1e-6)
    assert selection.used == 1
    real = ours >= 0
    assert torch.equal(taken[real], ours[real].long())
    assert bool(
        (SCORES.gather(-1, taken)[~real & (torch.arange(4) < 2)[None, :, None]] == NEVER).all()
    )  # unused: unseen


@pytest.mark.parametrize(
    ("scale", "shortfall"), [(1.0, 1 / 8), (0.2, 1 / 8), (1e-3, 1e-3 / 0.1)], ids=["usual", "fifth", "cancelled"]
)
def test_a_row_whose_head_weights_cancel_is_held_to_the_usual_scores(scale: float, shortfall: float) -> None:
    """Its scores are as far off as those of any other row."""
    scores = SCORES.clone()
    scores[0, 3] *= scale
    rows = [[0, -1], [0, 1], [0, 1], [0, 1]]
    selection_ = SameSelection([selection(rows)])
    with selection_.taken():
        scores.topk(2, dim=-1)
    assert selection_.shortfall == pytest.approx(shortfall, rel=1e-4)


def test_a_nan_score_is_not_zero_shortfall() -> None:
    scores = SCORES.clone()
    scores[0, 3, 0] = torch.nan
    selection = SameSelection([BEST])
    with selection.taken():
        scores.topk(2, dim=-1)
    assert not selection.shortfall <= 1.0


@pytest.mark.parametrize("shape", [(5, 4, 2), (5, 4, 4), (5, 4)], ids=["groups", "as-many-groups", "experts"])
def test_routers_are_left_alone(shape: tuple[int, ...]) -> None:
    """Group routing uses a 3-D topk too, of [tokens, groups, experts in a group]."""
    routed = torch.rand(shape)
    selection = SameSelection([])
    with selection.taken():
        found = routed.topk(2, dim=-1)
    assert torch.equal(found.values, routed.topk(2, dim=-1).values)
    assert selection.used == 0


def test_ties_go_to_the_lowest_slot() -> None:
    with lowest_slot_ties():
        assert torch.zeros(1, 3, 64).topk(5, dim=-1).indices.tolist() == [[list(range(5))] * 3]


def select(same: SameSelection, calls: int, count: int = 2) -> None:
    with same.taken():
        for _ in range(calls):
            SCORES.topk(count, dim=-1)


@pytest.mark.parametrize(("layers", "calls"), [(2, 1), (1, 2), (1, 0), (0, 1)])
def test_selecting_more_or_less_than_once_a_layer_is_refused(layers: int, calls: int) -> None:
    same = SameSelection([BEST] * layers)
    said = rf"^transformers \S+ selected keys {calls} times .* expected {layers}, once a layer"
    with pytest.raises(UserError, match=said):
        select(same, calls)


def test_selecting_another_number_of_keys_is_refused() -> None:
    with pytest.raises(UserError, match=r"layer 1 .* selects 3 of 4 keys, our graph 2 of 4"):
        select(SameSelection([BEST]), 1, count=3)


def _out(scores: Tensor, count: int) -> Tensor:
    place = (scores.new_empty(0), torch.empty(0, dtype=torch.int64))
    torch.topk(scores, count, out=place)
    return place[1]


CALLS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "method": lambda scores, count: scores.topk(count, dim=-1).indices,
    "method-by-name": lambda scores, count: scores.topk(k=count, dim=2, largest=True, sorted=False)[1],
    "class": lambda scores, count: torch.Tensor.topk(scores, count).indices,
    "function": lambda scores, count: torch.topk(scores, count, dim=-1).indices,
    "function-by-name": lambda scores, count: torch.topk(input=scores, k=count, dim=2)[1],
    "out": _out,
    "op": lambda scores, count: torch.ops.aten.topk(scores, count)[1],
    "overload": lambda scores, count: torch.ops.aten.topk.default(scores, k=count)[1],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_our_selection_is_taken_however_topk_is_called(call: Callable[[Tensor, int], Tensor]) -> None:
    worst = selection([[3, 2], [3, 2], [1, 3], [3, 1]])
    same = SameSelection([worst])
    with same.taken():
        assert torch.equal(call(SCORES, 2), worst.long())
    assert same.used == 1


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_ties_go_to_the_lowest_slot_however_topk_is_called(call: Callable[[Tensor, int], Tensor]) -> None:
    with lowest_slot_ties():
        assert call(torch.zeros(1, 3, 64), 5).tolist() == [[list(range(5))] * 3]


@pytest.mark.parametrize("options", [{"largest": False}, {"dim": 1}, {"dim": 0, "k": 1}], ids=str)
def test_another_topk_is_left_alone(options: dict[str, int]) -> None:
    arguments = {"k": 2, **options}
    same = SameSelection([])
    with same.taken(), lowest_slot_ties():
        assert torch.equal(SCORES.topk(**arguments).values, torch.topk(SCORES, **arguments).values)
    assert same.used == 0


TOKENS, TOPK = 12, 4


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(TOKENS)[None]}


@pytest.fixture
def model() -> Any:
    return families.build("deepseek_v32", index_topk=TOPK)


def own_choice(model: Any) -> tuple[Logits, list[Tensor]]:
    """(logits, the slots every indexer took, -1 for one in the future)."""
    taken: list[Tensor] = []
    seen = torch.arange(TOKENS)[None, :, None]
    for layer in model.model.layers:
        layer.self_attn.indexer.register_forward_hook(
            lambda *call: taken.append(call[-1].masked_fill(call[-1] > seen, -1))
        )
    with torch.no_grad():
        return Logits(model(**inputs(), use_cache=False).logits), taken


def test_parity_with_transformers_itself(model: Any) -> None:
    found, taken = own_choice(model)
    difference, shortfall = parity(model, inputs(), found, taken)
    assert difference < 1e-6  # of products of other sizes
    assert shortfall == 0.0
    changed = Logits(found.x + torch.eye(TOKENS, found.x.shape[-1])[None] * found.x.abs().max())
    assert parity(model, inputs(), changed, taken[:2])[0] == pytest.approx(1.0)


def test_parity_takes_our_selection(model: Any) -> None:
    """The latest keys instead of the best: scored worse, and other logits."""
    found, taken = own_choice(model)
    latest = (torch.arange(TOKENS)[:, None] - torch.arange(TOPK))[None].clamp(min=-1).int()
    difference, shortfall = parity(model, inputs(), found, [latest for _ in taken])
    assert difference > 1e-3
    assert 0.01 < shortfall < torch.inf


def test_an_indexer_that_selects_without_topk_is_refused(model: Any) -> None:
    found, taken = own_choice(model)
    indexer = model.model.layers[0].self_attn.indexer
    indexer.forward = lambda *args, **kwargs: taken[0].clamp(min=0)
    with pytest.raises(UserError, match=r"selected keys 1 times .* expected 2, once a layer.*--skip-transformers"):
        parity(model, inputs(), found, taken)


@pytest.mark.parametrize(
    "capped",
    [None, lambda x: 3 * torch.tanh(x / 3), lambda x: x.mul_(2), lambda x: x.div_(30).tanh_().mul_(30)],
    ids=["the head's", "capped after the head", "scaled in place", "capped in place"],
)
def test_logits_are_the_models(
    model: Any, capped: Callable[[Tensor], Tensor] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made of what the head is given, unless the model does something with what the head gives."""
    forward = model.forward
    if capped is not None:

        def then(**inputs: Any) -> Any:
            out = forward(**inputs)
            out.logits = capped(out.logits)
            return out

        monkeypatch.setattr(model, "forward", then)
    head = model.lm_head
    found = logits(model, inputs())
    assert model.lm_head is head
    assert (found.head is None) == (capped is not None)
    with torch.no_grad(), lowest_slot_ties():
        wanted = model(**inputs(), use_cache=False).logits
    torch.testing.assert_close(found.rows(slice(None)), wanted[0], rtol=0, atol=1e-6)


def test_parity_of_a_model_that_scales_its_logits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run twice, each time over our selection."""
    forward = model.forward

    def scaled(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(model, "forward", scaled)
    found, taken = own_choice(model)
    assert parity(model, inputs(), found, taken) == (pytest.approx(0, abs=1e-6), 0.0)


@pytest.mark.parametrize(
    ("file", "text", "part"),
    [
        (GENERATION, "[]", "transformers does not accept it ('list' object is not a mapping)"),
        (GENERATION, "{", "is not a valid JSON file"),
        (GENERATION, '{"max_new_tokens": "x"}', "transformers does not accept it"),
        (INDEX, "{}", 'has no "metadata"'),
        (INDEX, '{"metadata": null}', 'has no "metadata"'),
    ],
    ids=["generation list", "generation cut off", "generation odd", "index without", "index null"],
)
def test_files_that_transformers_would_stumble_over_are_told_before_work(
    file: str, text: str, part: str, tmp_path: Path
) -> None:
    families.build("deepseek_v3").save_pretrained(tmp_path, max_shard_size="100KB")  # type: ignore[operator]
    made, path = Checkpoint.open(tmp_path), tmp_path / file
    refuse_if_too_large(made)
    before = json.loads(path.read_text()) if path.exists() else {}
    before.pop("metadata", None)
    path.write_text(json.dumps({**before, **json.loads(text)}) if file == INDEX else text)
    with pytest.raises(UserError) as error:
        refuse_if_too_large(made)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith(", or pass --skip-transformers")
    assert part in str(error.value)


def test_a_model_may_have_no_generation_config(tmp_path: Path) -> None:
    """transformers then looks for its fields in config.json, which is called otherwise until a conversion is proven."""
    families.build("deepseek_v3").save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / GENERATION).unlink()
    (tmp_path / "config.json").rename(tmp_path / UNPROVEN_CONFIG)
    ids = torch.arange(3, 11)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(8)[None]}
    made = Checkpoint.open(tmp_path, config_file=UNPROVEN_CONFIG)
    _, faults = loaded_logits(made, "DeepseekV3ForCausalLM", given)
    assert faults == []
