"""The recipe: everything a conversion can be told, validated before any work. Flags override the file, the file the defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..errors import UsageError, UserError, short
from ..files.regular import read_within

_MOST_BYTES = (
    100_000  # of the file: fixed by what a person writes, of which a recipe with every setting has a hundredth
)
CLOSED_FORM_SEQUENCES = 16  # swept by benchmarks/constants.py
DISTIL_SEQUENCES = 64  # swept by benchmarks/constants.py


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_number)]  # YAML 1.1 reads 3e-3 as text


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError("a path has no NUL character")
    if not value:
        raise ValueError("expected a path, found none")
    return value


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}  # seconds
_BUDGET = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) *(s|m|h|tokens|steps)", re.ASCII)


def read_budget(text: str) -> tuple[float, Literal["seconds", "tokens", "steps"]]:
    """What `10m`, `500000 tokens` or `2000 steps` says. Raises ValueError for anything else, and for nothing."""
    found = _BUDGET.fullmatch(text)
    if found is None or float(found[1]) == 0:
        raise ValueError("expected a time (90s, 10m, 1.5h), tokens (500000 tokens) or steps (2000 steps)")
    amount, unit = float(found[1]), found[2]
    if unit in _UNITS:
        return amount * _UNITS[unit], "seconds"
    return amount, "tokens" if unit == "tokens" else "steps"


def _budget(value: Any) -> str:
    text = str(value).strip()
    read_budget(text)
    return text


FilePath = Annotated[str, AfterValidator(_path)]  # or a hub id
BudgetText = Annotated[str, BeforeValidator(_budget)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Distil(_Strict):
    """Schedule of the distillation: steps of one sequence each in every layer, peak learning rate."""

    steps: Count = 1024  # swept by benchmarks/constants.py
    lr: Number = Field(default=3e-3, gt=0, allow_inf_nan=False)  # swept by benchmarks/constants.py


class Verify(_Strict):
    """Limits of the verification. max_loss_delta: nats/token on held-out text, all layers sparse at once."""

    # benchmarks/constants.py: good conversions cost 0.02, closed forms of 24 channels 0.044; an untrained indexer in layer 0 costs 0.06.
    max_loss_delta: Number = Field(default=0.05, gt=0, allow_inf_nan=False)
    # benchmarks/constants.py: standard error of the loss increase 0.006 with 8, 0.012 with 2.
    sequences: Count = 8


TRAINED = ("auto", "distil")
WRITTEN = ("layout", "mtp", "untie", "target")  # how the result is written, which no indexer depends on


class Recipe(_Strict):
    """What the user asks for. None means: chosen from the model (see `docs/recipe.md`)."""

    indexer: Literal["auto", "closed-form", "distil", "donor"] = "auto"
    donor: FilePath | None = None
    budget: BudgetText | None = None
    index_topk: Count | None = None
    index_n_heads: Count | None = None
    index_head_dim: Count | None = None
    calibration: FilePath | None = None
    tokens: Count | None = None
    sequence_length: int | None = Field(default=None, ge=2, lt=2**31)
    rows: Count = 128  # swept by benchmarks/constants.py
    random_share: Number = Field(default=0.25, ge=0, le=0.9)  # swept by benchmarks/constants.py
    seed: int = Field(default=0, ge=0, lt=2**32)
    distil: Distil = Distil()
    verify: Verify = Verify()
    layout: Literal["auto", "deepseek_v32", "glm_moe_dsa", "own"] = "auto"
    mtp: Literal["keep", "drop"] = "keep"
    untie: bool = False
    target: list[Literal["transformers", "vllm", "sglang", "tensorrt-llm", "mlx-lm", "llama.cpp"]] = []

    @model_validator(mode="after")
    def _donor_has_a_path(self) -> Recipe:
        if (self.indexer == "donor") != (self.donor is not None):
            raise ValueError("donor needs a path (donor:PATH), and no other source takes one")
        return self

    @model_validator(mode="after")
    def _budget_is_spent(self) -> Recipe:
        if self.budget is not None and self.indexer not in TRAINED:
            raise ValueError(f"{self.indexer} does not train, a budget is for auto and distil")
        return self

    @property
    def distils(self) -> bool:
        """auto trains on text alone: on random tokens nothing would show what that does to text."""
        return self.indexer == "distil" or (self.indexer == "auto" and self.calibration is not None)

    @property
    def sequences(self) -> int:
        """Of text, where `tokens` does not say."""
        return DISTIL_SEQUENCES if self.distils else CLOSED_FORM_SEQUENCES

    def random_beside(self, sequences: int) -> int:
        """Sequences of random tokens that go with so many of text, to make `random_share` of all."""
        if self.calibration is None:
            return 0  # they are random already
        return round(sequences * self.random_share / (1 - self.random_share))


def read_recipe(file: str | None, flags: Mapping[str, Any]) -> Recipe:
    """The recipe in `file` (YAML), overridden by `flags` that are not None. Raises UsageError naming the bad field."""
    fields = _read_yaml(file) if file else {}
    fields |= {name: value for name, value in flags.items() if value is not None}
    if isinstance(fields.get("target"), str):
        fields["target"] = fields["target"].split(",")
    source = str(fields.get("indexer", ""))
    if source.startswith("donor:"):
        fields |= {"indexer": "donor", "donor": source.removeprefix("donor:") or None}
    elif flags.get("indexer") is not None:
        fields.pop("donor", None)  # the flag overrides the file's donor, path and all
    if flags.get("indexer") is not None and flags.get("budget") is None and source not in TRAINED:
        fields.pop("budget", None)  # and a budget that it has no use for
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(_explain(first, file, flags)) from None


def _explain(error: Any, file: str | None, flags: Mapping[str, Any]) -> str:
    """One line for pydantic's first finding: a flag is called by its flag, a field by its place in the file."""
    flag = error["loc"][:1] and flags.get(error["loc"][0]) is not None
    place = error["loc"][:1] if flag else error["loc"]  # where in a flag's list is seen from what was given
    where = short(".".join(map(str, place))) or "indexer"
    source = f"--{where.replace('_', '-')}" if flag or file is None else f"{file}: {where}"
    if error["type"] == "extra_forbidden":
        groups: dict[str, type[BaseModel]] = {"distil": Distil, "verify": Verify}
        known = groups.get(error["loc"][0], Recipe).model_fields
        return f"{source}: no such field; known are {', '.join(known)}"
    given = f" {short(repr(error['input']))}" if error["loc"] else ""
    return f"{source}{given}: {error['msg'].removeprefix('Value error, ')}"


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        fields = yaml.load(read_within(Path(file), _MOST_BYTES).decode(), _PlainLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: recipe cannot be read ({error})") from None
    except UserError as error:
        raise UsageError(f"recipe cannot be read: {error}") from None
    except RecursionError:
        raise UsageError(f"{file}: not a recipe, nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{file}: not YAML ({where}{short(str(getattr(error, 'problem', None) or error))})") from None
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise UsageError(f"{file}: expected a mapping of recipe fields")
    return fields


class _PlainLoader(yaml.SafeLoader):
    """YAML without what a recipe has no use for: aliases, whose expansion knows no bounds, and keys that are there twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not taken", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.MarkedYAMLError(problem="a field is there twice", problem_mark=node.start_mark)
        return found
