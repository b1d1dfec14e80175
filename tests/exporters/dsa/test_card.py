"""README.md of a converted folder: what it says is what was measured; the dense model's own card lies beside and comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, mla2dsa, quick_capture, small_conversion  # noqa: F401  (a fixture)
from huggingface_hub import ModelCard

from mla2dsa.exporters.dsa.card import _verification, write_card

pytestmark = pytest.mark.usefixtures("quick_capture")
TARGETS = {
    "vllm": {"version": "1", "loads": False, "because": ["a|b"], "start": "vllm serve {model}"},
    "sglang": {"version": "2", "loads": True, "because": [], "start": "sglang serve {model}"},
}
REPORT: Mapping[str, Any] = {
    "plan": {
        "indexer": {"index_topk": 64, "index_n_heads": 4, "index_head_dim": 32},
        "notes": ["a note"],
        "targets": TARGETS,
    }
}


def card_of(tmp_path: Path, readme: str | None, model: str, report: Mapping[str, Any] | None = REPORT) -> ModelCard:
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    folder.mkdir()
    if readme is not None:
        (source / "README.md").write_text(readme)
    recipe = {"indexer": "distil", "donor": None, "calibration": "/private/secret.txt", "distil": {"steps": 3}}
    write_card(folder, source, {"model": model, "recipe": recipe}, report)
    return ModelCard.load(folder / "README.md")


def test_a_converted_folder_says_what_was_measured(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    dsa = small_conversion(tmp_path_factory)
    card, report = ModelCard.load(dsa / "README.md"), json.loads((dsa / "report.json").read_text())
    assert (card.data.license, card.data.language, card.data.base_model) == ("apache-2.0", ["code"], None)
    assert card.data.tags == ["dsa", "sparse-attention", "mla2dsa"]  # not the dense model's
    for check in report["verification"]["checks"]:
        assert f"| {check['name']} | {check['value']:.3g} | {check['limit']:.3g} | ok |" in card.text
    found = report["verification"]["text"]["by_selection"]["dsa"]
    assert f"| DSA | {found['loss_delta']:+.4f} | {found['standard_error']:.4f} |" in card.text
    assert "`transformers serve .`" in card.text
    assert "index_topk: 32\n" in card.text
    assert str(TINY) not in card.text
    own = (TINY / "README.md").read_bytes()
    assert (dsa / "mla2dsa.source-README.md").read_bytes() == own
    assert mla2dsa("strip", dsa, tmp_path / "dense").code == 0
    assert (tmp_path / "dense" / "README.md").read_bytes() == own


def test_the_base_model_is_a_hub_id(tmp_path: Path) -> None:
    card = card_of(tmp_path, "---\nlicense: mit\ntags: [dense]\nbase_model: x/y\n---\nMy words", "some/model")
    assert (card.data.base_model, card.data.license) == ("some/model", "mit")
    assert card.text.startswith("\n# model with DeepSeek Sparse Attention") or "# model with" in card.text
    for part in ("mla2dsa.source-README.md", "steps: 3", "* a note", "`sglang serve .`", "does not load it: a\\|b"):
        assert part in card.text
    assert not any(part in card.text for part in ("My words", "secret", "donor"))


def test_metadata_is_text(tmp_path: Path) -> None:
    """YAML can name a list within itself, and one that is a million entries."""
    card = card_of(
        tmp_path, "---\nlicense: &a [*a]\nlanguage: [en, zh]\nlicense_link: {a: b}\n---\nMy words", "some/model"
    )
    assert (card.data.license, card.data.language, card.data.get("license_link")) == (None, ["en", "zh"], None)


@pytest.mark.parametrize(
    "readme", [None, "no metadata", "---\nlicense: [\n---\nbroken", "---\n- a list\n---\n"], ids=str
)
def test_a_card_that_cannot_be_read_does_no_harm(readme: str | None, tmp_path: Path) -> None:
    card = card_of(tmp_path, readme, str(tmp_path / "my-model"), None)
    assert "# my-model with" in card.text
    assert "**Not verified**" in card.text
    assert str(tmp_path) not in card.text
    assert card.data.base_model is None
    assert ("mla2dsa.source-README.md" in card.text) == (readme is not None)


def test_a_figure_that_is_no_number_is_a_dash() -> None:
    """Of a single sequence there is no standard error, which JSON has as null."""
    quality = {"loss_delta": 0.01, "standard_error": None, "kl": 0.02, "same_top": 0.9}
    text = {"positions": 10, "length": 64, "dense_loss": 2.0, "by_selection": {"dsa": quality}}
    checks = [{"name": "loss", "value": None, "limit": 0.05, "passed": False}]
    lines = "\n".join(_verification({"checks": checks, "text": text}))
    assert "| loss | - | 0.05 | FAILED |" in lines
    assert "| +0.0100 | - | 0.0200 | 90.0% |" in lines
