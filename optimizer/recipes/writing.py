"""A recipe as a file for people: every field with its value and what it is for, in the words of the fields themselves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from ...errors import UsageError, UserError, short
from ...files.writing import write_new
from ..recipe import Recipe

_COMMENT, _WIDTH = 26, 120  # columns: where comments begin, where lines end
_NARROWEST = 40  # columns of a comment beside a long value
_DEFAULTS = "Every field with its default. All may be left out; a flag of the command line overrides the file."


def recipe_text(recipe: Recipe | None = None, about: str = _DEFAULTS, notes: Mapping[str, str] | None = None) -> str:
    """YAML that `read_recipe` reads as `recipe` (None: the default one). about: what the file is; notes: by field, what is added to
    what the field is for."""
    recipe = recipe or Recipe()
    lines = [*_comment(about, 0), "", *_group(Recipe, recipe.fields(), notes or {})]
    return "\n".join(lines) + "\n"


def write_recipe(file: Path, text: str) -> None:
    """Raises UsageError where there is anything of that name already."""
    try:
        write_new(file, text)
    except FileExistsError:
        raise UsageError(f"{file}: is there already and is left as it is; name a new file with -o") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from None


def _group(
    kind: type[BaseModel], values: Mapping[str, Any], notes: Mapping[str, str], indent: str = ""
) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        value, comment = values[name], field.description or ""
        if name in notes:
            comment = f"{comment}; {notes[name]}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _field(f"{indent}{name}:", comment)
            yield from _group(inner, value, notes, indent + "  ")
        elif name == "layers" and value:
            yield from _field(f"{indent}{name}:", comment)
            yield from (f"{indent}  {_scalar(pattern)}: {_flow(said)}" for pattern, said in value.items())
        else:
            yield from _field(f"{indent}{name}: {_flow(value)}", comment)


def _field(text: str, comment: str) -> Iterator[str]:
    """With the comment beside it, and below where it is long."""
    column = max(_COMMENT, min(len(text) + 2, _WIDTH - _NARROWEST))
    first, *others = _comment(comment, column) or [""]
    if len(text) + 2 > column:
        yield text
        yield first
    else:
        yield f"{text:{column}}{first.lstrip()}".rstrip()
    yield from others


def _comment(text: str, column: int) -> list[str]:
    wrapped = textwrap.wrap(text, _WIDTH - column - 2, break_long_words=False, break_on_hyphens=False)
    return [f"{'':{column}}# {line}" for line in wrapped]


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    if isinstance(value, str):
        return _scalar(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(name)}: {_flow(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _dumped(value)


def _scalar(text: str) -> str:
    """A string, plain where YAML reads that as the same string."""
    plain = _dumped(text)
    return _dumped(text, '"') if "\n" in plain else plain


def _dumped(value: Any, style: str | None = None) -> str:
    # in a list, where a string that ends a flow has to be quoted, and no end of document follows
    return yaml.safe_dump([value], default_flow_style=True, default_style=style, width=math.inf).strip()[1:-1]


def notes_of(model: str, config: Mapping[str, Any]) -> dict[str, str]:
    """What config.json of a model says to the fields that depend on it."""
    from ..indexer.sizes import MEASURED, indexer_sizes

    name, (topk, heads, width) = short(model), indexer_sizes(Recipe(), config)
    context = config.get("max_position_embeddings")
    fits = f"at most {context - MEASURED}, its context is {context} tokens" if isinstance(context, int) else str(topk)
    return {
        "index_topk": f"for {name} {fits}",
        "index_n_heads": f"for {name} {heads}",
        "index_head_dim": f"for {name} {width}",
    }
