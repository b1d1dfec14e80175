"""README.md of a DSA checkpoint: what it was made from and how, what was measured, what it is not, how it is served.

Of the dense model's own card the metadata that is still true is taken over (licence, languages, what it is for); its text speaks of
the dense model, and lies beside as it was, for people and for `strip`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .names import CARD, DENSE_CARD, MANIFEST, RECIPE

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_STILL_TRUE = ("license", "license_name", "license_link", "language", "pipeline_tag")
_SELECTIONS = {"dsa": "DSA", "oracle": "oracle top-k (the best any selection can do)", "window": "window + 4 sinks"}
_PLACES = ("calibration", "donor")  # paths of the machine that it was made on
_LIMITS = (
    "The indexers alone were fitted; the model was not trained further.",
    "Up to index_topk tokens the attention is the dense model's. Beyond, quality is what the tables here say, on their text and at their "
    "length: measure on your own with `mla2dsa verify`.",
)


def write_card(folder: Path, source: Path, manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
    """`folder`: of the DSA checkpoint, without a card; source: of the dense one. report: None where nothing was proved."""
    from huggingface_hub import ModelCard, ModelCardData

    from ...files.writing import write_new

    name, kept = str(manifest.get("model", source.name)), _kept(source)
    hub = name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None
    data = ModelCardData(
        base_model=hub, library_name="transformers", tags=["dsa", "sparse-attention", "mla2dsa"], **kept
    )
    title = (hub or Path(name).name or source.name).rpartition("/")[2]
    whole = RECIPE if (folder / RECIPE).is_file() else MANIFEST
    body = "\n".join(_body(title, hub, manifest, report or {}, (source / CARD).is_file(), whole))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
    write_new(folder / CARD, str(card))


def _kept(source: Path) -> dict[str, Any]:
    """Metadata of the dense model's card that holds for this one."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if not (source / CARD).is_file():
        return {}
    try:
        given = ModelCard((source / CARD).read_text(errors="replace")).data.to_dict()
    except (ValueError, TypeError, YAMLError):  # people write these by hand; it lies beside as it was
        return {}
    return {name: given[name] for name in _STILL_TRUE if _is_plain(given.get(name))}


def _is_plain(value: Any) -> bool:
    """A text or a list of texts, as these fields have: YAML could hold a list within itself."""
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
    )


def _body(
    title: str, hub: str | None, manifest: Mapping[str, Any], report: Mapping[str, Any], has_card: bool, whole: str
) -> Iterator[str]:
    yield f"# {title} with DeepSeek Sparse Attention\n"
    yield f"{hub or title}, its dense attention made sparse by mla2dsa: indexers are added to the dense weights,"
    yield "which `mla2dsa strip` gives back bit for bit."
    if has_card:
        yield f"The dense model's own card: [{DENSE_CARD}]({DENSE_CARD})."
    yield from _recipe(manifest.get("recipe"), report.get("plan", {}), whole)
    yield from _verification(report.get("verification"))
    yield "\n## Limits\n"
    yield from (f"* {limit}" for limit in (*_LIMITS, *report.get("plan", {}).get("notes", ())))
    yield from _serving(report.get("plan", {}).get("targets", {}))


_FIGURES = {"loss_delta": "+.4f", "standard_error": ".4f", "kl": ".4f", "same_top": ".1%"}


def _recipe(recipe: Any, plan: Mapping[str, Any], whole: str) -> Iterator[str]:
    """whole: the file that has all of it."""
    import yaml

    if isinstance(indexer := plan.get("indexer"), Mapping):
        sizes = f"top-k {indexer['index_topk']}, {indexer['index_n_heads']} heads of {indexer['index_head_dim']}"
        if shared := indexer.get("shared"):
            names = ", ".join(f"`{plan['layers'][number]['name']}`" for number in shared)
            sizes += f"; without one, attending to what the last layer before selected: {names}"
        yield f"\n## Recipe\n\nIndexers: {sizes}. The whole recipe is in `{whole}`; in short:\n"
    if isinstance(recipe, Mapping):
        told = {name: value for name, value in recipe.items() if value not in (None, [], {}) and name not in _PLACES}
        yield f"```yaml\n{yaml.safe_dump(told, sort_keys=False)}```"


def _verification(found: Any) -> Iterator[str]:
    yield "\n## Verification\n"
    if not isinstance(found, Mapping):
        yield "**Not verified**: the conversion was told to leave it out."
        return
    yield "| check | value | limit | |\n|---|---|---|---|"
    for check in found["checks"]:
        value, limit = (_figure(check[name], ".3g") for name in ("value", "limit"))
        yield f"| {_cell(check['name'])} | {value} | {limit} | {'ok' if check['passed'] else 'FAILED'} |"
    text = found["text"]
    loss = _figure(text["dense_loss"], ".4f")
    yield f"\n{text['positions']} positions, sequences of {text['length']} tokens; dense loss {loss} nats/token.\n"
    yield "| selection | loss increase | s.e. | KL | same top token |\n|---|---|---|---|---|"
    for name, one in text["by_selection"].items():
        figures = (_figure(one[field], form) for field, form in _FIGURES.items())
        yield f"| {_SELECTIONS.get(name, name)} | {' | '.join(figures)} |"
    yield from (f"\nNot checked: {name}" for name in found.get("skipped", ()))


def _figure(value: Any, form: str) -> str:
    """None is what a report has for a figure that is not a number: the error of a single sequence."""
    return "-" if value is None else format(value, form)


def _serving(targets: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if targets:
        yield "\n## How to serve\n\n| runtime | |\n|---|---|"
    for name, one in targets.items():
        word = (
            f"`{one['start'].format(model='.')}`"
            if one["loads"]
            else f"does not load it: {_cell('; '.join(one['because']))}"
        )
        yield f"| {name} {one['version']} | {word} |"


def _cell(text: str) -> str:
    """As a table holds it."""
    return text.replace("|", "\\|").replace("\n", " ")
