"""The recipe: everything a conversion can be told, validated before any work. Flags override the file, the file the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UsageError

DEFAULT_TOPK = 2048
CLOSED_FORM_SEQUENCES = 16
DISTIL_SEQUENCES = 64


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Distil(_Strict):
    """Schedule of the distillation: steps of one sequence each, peak learning rate."""

    steps: int = Field(default=256, ge=1)
    lr: float = Field(default=3e-3, gt=0)


class Verify(_Strict):
    """Limits of the verification. max_loss_delta: nats/token on held-out text, all layers sparse at once."""

    max_loss_delta: float = Field(default=0.05, gt=0)
    sequences: int = Field(default=8, ge=1)


class Recipe(_Strict):
    """What the user asks for. None means: chosen from the model (see `docs/recipe.md`)."""

    indexer: Literal["closed-form", "distil", "donor"] = "closed-form"
    donor: str | None = None
    index_topk: int | None = Field(default=None, ge=1)
    index_n_heads: int | None = Field(default=None, ge=1)
    index_head_dim: int | None = Field(default=None, ge=1)
    calibration: str | None = None
    tokens: int | None = Field(default=None, ge=1)
    sequence_length: int | None = Field(default=None, ge=2)
    rows: int = Field(default=128, ge=1)
    seed: int = 0
    distil: Distil = Distil()
    verify: Verify = Verify()

    @model_validator(mode="after")
    def _donor_has_a_path(self) -> Recipe:
        if (self.indexer == "donor") != (self.donor is not None):
            raise ValueError("indexer donor needs a path (donor:PATH), and only donor takes one")
        return self


def read_recipe(file: str | None, flags: Mapping[str, Any]) -> Recipe:
    """The recipe in `file` (YAML), overridden by `flags` that are not None. Raises UsageError naming the bad field."""
    fields = _read_yaml(file) if file else {}
    fields |= {name: value for name, value in flags.items() if value is not None}
    source = str(fields.get("indexer", ""))
    if source.startswith("donor:"):
        fields |= {"indexer": "donor", "donor": source.removeprefix("donor:") or None}
    try:
        return Recipe(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "recipe"
        raise UsageError(
            f"{file or 'flags'}: {where}: {first['msg']}" + (f", got {first['input']!r}" if first["loc"] else "")
        ) from None


def _read_yaml(file: str) -> dict[str, Any]:
    import yaml

    try:
        fields = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: recipe cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(fields, dict):
        raise UsageError(f"{file}: expected a mapping of recipe fields")
    return fields
