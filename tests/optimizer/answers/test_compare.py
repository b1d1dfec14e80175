"""compare: texts, first difference, KL and rank along the dense text, against what transformers computes; what is no pair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chatty import greedy, open_once
from command_line import assert_refused, mla2dsa, small_conversion
from places import TINY
from torch import Tensor

COUNT = 12
LONG = (TINY / "held_out" / "asyncio.proactor_events.py.txt").read_text()[:900]
SHORT = "def"


@pytest.fixture(scope="module")
def dsa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """index_topk 32."""
    return small_conversion(tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def opened_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        open_once(patch)
        yield


@pytest.fixture(scope="module")
def told(dsa: Path, opened_once: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": LONG}) + "\n")
    done = mla2dsa("compare", TINY, dsa, SHORT, "--prompts", file, "--max-new-tokens", COUNT, "--json")
    assert (done.code, done.err) == (0, "")
    return done.json()


def logits(folder: Path, ids: list[int]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids])).logits[0]
    return found


def tokens_of(prompt: str) -> list[int]:
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(TINY)(prompt)["input_ids"])


def test_both_texts_are_those_of_transformers(told: dict[str, Any], dsa: Path) -> None:
    ids = tokens_of(LONG)
    _, long = told["prompts"]
    assert long["prompt_tokens"] == len(ids) > told["index_topk"] == 32
    assert long["dense"] == greedy(TINY, ids, COUNT)
    assert long["dsa"] == greedy(dsa, ids, COUNT)


def test_positions_are_what_transformers_computes(told: dict[str, Any], dsa: Path) -> None:
    """Both models led through the dense text."""
    ids, found = tokens_of(LONG), told["prompts"][1]["positions"]
    said = [position["token"] for position in found]
    ours, theirs = (logits(folder, ids + said[:-1])[len(ids) - 1 :].double().log_softmax(-1) for folder in (TINY, dsa))
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    assert said == ours.argmax(-1).tolist()
    assert float(kl.max()) > 1e-3  # there is something to see
    torch.testing.assert_close(torch.tensor([it["kl"] for it in found]).double(), kl, atol=1e-4, rtol=1e-2)
    order = theirs.argsort(-1, descending=True)
    ranks = [int((row == token).nonzero()) + 1 for row, token in zip(order, said, strict=True)]
    assert [it["rank"] for it in found] == ranks
    assert told["prompts"][1]["agreement"] == sum(rank == 1 for rank in ranks) / COUNT
    for place, logprobs in (("dense_logprob", ours), ("dsa_logprob", theirs)):
        expected = logprobs.gather(1, torch.tensor(said)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor([it[place] for it in found]).double(), expected, atol=1e-3, rtol=1e-3)


def test_up_to_index_topk_both_say_the_same(told: dict[str, Any]) -> None:
    short = told["prompts"][0]
    assert short["dense"] == short["dsa"]
    assert short["first_difference"] is None
    assert short["agreement"] == 1.0
    assert short["mean_kl"] < 1e-5


def test_the_first_difference_is_where_the_texts_part(told: dict[str, Any]) -> None:
    long = told["prompts"][1]
    difference, ranks = long["first_difference"], [it["rank"] for it in long["positions"]]
    assert ranks[difference["token"]] > 1
    assert set(ranks[: difference["token"]]) <= {1}
    assert difference["dense"] == long["positions"][difference["token"]]["text"] != difference["dsa"]


def test_the_terminal_has_both_side_by_side(dsa: Path) -> None:
    done = mla2dsa("compare", TINY, dsa, SHORT, "--max-new-tokens", COUNT)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"==> {SHORT} <==\n")
    for part in ("dense", "both texts are the same", f"{COUNT} of {COUNT} positions", "no more than index_topk 32"):
        assert part in done.out


def test_what_is_no_pair(dsa: Path, tmp_path: Path) -> None:
    assert_refused(mla2dsa("compare", dsa, TINY, "x"), 1, dsa, "expected the dense checkpoint first")
    assert_refused(mla2dsa("compare", TINY, TINY, "x"), 1, "a dense checkpoint (no indexer)")
    assert_refused(mla2dsa("compare", TINY, dsa), 2, "no prompt")
    assert_refused(mla2dsa("compare", TINY, dsa, "x", "--max-new-tokens", 0), 2, "--max-new-tokens 0")
    other = Path(shutil.copytree(dsa, tmp_path / "other"))
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    assert_refused(mla2dsa("compare", TINY, other, "x"), 1, other, "reads a prompt differently")
