"""The recipe: everything a conversion can be told, validated before any work. Flags override the file, the file the defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..errors import UsageError, short
from .recipes.reading import read_yaml

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
_LAYER = re.compile(r"[0-9]{1,9}")
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


def _share(value: Any) -> Any:
    numbers = isinstance(value, list) and all(type(number) is int and number > 0 for number in value)
    if value not in ("none", "auto") and not (numbers and value == sorted(set(value))):
        raise ValueError("expected none, auto, or layers' numbers in ascending order; the first layer, 0, cannot share")
    return value or "none"


FilePath = Annotated[str, AfterValidator(_path)]  # or a hub id
BudgetText = Annotated[str, BeforeValidator(_budget)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Share = Annotated[Literal["none", "auto"] | list[int], BeforeValidator(_share)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Distil(_Strict):
    """Schedule of the distillation."""

    steps: Count = Field(
        default=1024, description="a layer, one sequence each; fewer where the budget has no room"
    )  # swept by benchmarks/constants.py
    # swept by benchmarks/constants.py
    lr: Number = Field(default=3e-3, gt=0, allow_inf_nan=False, description="peak rate, falls linearly to 5 %")


class Verify(_Strict):
    """Limits of the verification."""

    # benchmarks/constants.py: good conversions cost 0.02, closed forms of 24 channels 0.044; an untrained indexer in layer 0 costs 0.06.
    max_loss_delta: Number = Field(
        default=0.05, gt=0, allow_inf_nan=False,
        description="nats/token on sequences kept aside, all layers sparse at once",
    )  # fmt: skip
    # benchmarks/constants.py: standard error of the loss increase 0.006 with 8, 0.012 with 2.
    sequences: Count = Field(default=8, description="how many to keep aside, at most")


TRAINED = ("auto", "distil")
_SIZES = ("index_topk", "index_n_heads", "index_head_dim")
WRITTEN = (
    "layout",
    "mtp",
    "untie",
    "target",
    "share",
    "share_loss",
)  # how the result is written, which no indexer depends on


class LayerDistil(_Strict):
    """As `Distil`, of some layers; None: as for all."""

    steps: Count | None = None
    lr: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None


class LayerRecipe(_Strict):
    """What may be said of some layers alone: how their indexers are made. None: as for all.

    The sizes are one number each in config.json, whatever the layout; text, rows and seed are of the one pass over the dense model
    that shows all layers what to fit on."""

    indexer: Literal["auto", "closed-form", "distil"] | None = None
    budget: BudgetText | None = None
    distil: LayerDistil = LayerDistil()

    @model_validator(mode="after")
    def _budget_is_spent(self) -> LayerRecipe:
        if self.budget is not None and self.indexer == "closed-form":
            raise ValueError("closed-form does not train, a budget is for auto and distil")
        return self


class Recipe(_Strict):
    """What the user asks for. None means: chosen from the model. The descriptions are what `recipe init` writes."""

    indexer: Literal["auto", "closed-form", "distil", "donor"] = Field(
        default="auto",
        description="auto | closed-form | distil | donor: auto is the closed form, then distillation of the layers where that "
        "leaves a gap, if there is text",
    )
    donor: FilePath | None = Field(
        default=None,
        description="with indexer: donor, a DSA checkpoint (folder or hub id) whose indexers fit",
    )
    budget: BudgetText | None = Field(
        default=None,
        description='what distillation may take in all: a time (90s, 10m, 1.5h), "500000 tokens" or "2000 steps"',
    )
    index_topk: Count | None = Field(
        default=None,
        description="past tokens each query attends to; null: 2048, or the donor's; smaller than the model's context",
    )
    index_n_heads: Count | None = Field(
        default=None, description="index heads; null: the model's attention heads, at most 64, or the donor's"
    )
    index_head_dim: Count | None = Field(default=None, description="width of an index head; null: 128, or the donor's")
    calibration: FilePath | None = Field(
        default=None,
        description='text file, folder of text, or .jsonl with a "text" field; null: random tokens',
    )
    tokens: Count | None = Field(
        default=None,
        description="how much of it to use; null: 64 sequences, 16 where nothing is distilled",
    )
    sequence_length: int | None = Field(
        default=None, ge=2, lt=2**31,
        description="null: 4 * index_topk, at least 1024, at most the context and what memory is planned for",
    )  # fmt: skip
    rows: Count = Field(default=128, description="query rows sampled per sequence")  # swept by benchmarks/constants.py
    # swept by benchmarks/constants.py
    random_share: Number = Field(
        default=0.25, ge=0, le=0.9,
        description="of the sequences that indexers are fitted on: random tokens, beside all of the text",
    )  # fmt: skip
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="sampling of rows, random tokens and order of the distillation"
    )
    distil: Distil = Field(default=Distil(), description="distillation")
    layers: dict[str, LayerRecipe] = Field(
        default={},
        description="some layers otherwise, by a pattern of their names: indexer, budget and distil, as in "
        '{"model.layers.[0-2].*": {indexer: closed-form}}; the last that matches holds',
    )
    share: Share = Field(
        default="none",
        description="none | auto | [2, 3, ...]: layers that attend to what the last layer before them selected, and have no indexer "
        "(GLM-5.2); auto takes as many as share_loss allows, a list their numbers (the first, 0, cannot)",
    )
    # Fixed by max_loss_delta, of which it is a tenth: what sharing costs comes on top of what being sparse does.
    share_loss: Number = Field(
        default=0.005, gt=0, allow_inf_nan=False,
        description="nats/token that sharing may cost on sequences kept aside, with share: auto",
    )  # fmt: skip
    verify: Verify = Field(default=Verify(), description="limits of the verification")
    layout: Literal["auto", "deepseek_v32", "glm_moe_dsa", "own"] = Field(
        default="auto", description="auto | deepseek_v32 | glm_moe_dsa | own (docs/families.md)"
    )
    mtp: Literal["keep", "drop"] = Field(
        default="keep",
        description="keep | drop: multi-token-prediction layers; only a donor has indexers for them",
    )
    untie: bool = Field(
        default=False,
        description="true: lm_head is written out where it is tied to the embedding (mlx-lm and vLLM's class need it)",
    )
    target: list[Literal["transformers", "vllm", "sglang", "tensorrt-llm", "mlx-lm", "llama.cpp"]] = Field(
        default=[],
        description="runtimes that must load the result (docs/targets.md): refused before any work where one would not",
    )

    @model_validator(mode="after")
    def _donor_has_a_path(self) -> Recipe:
        if (self.indexer == "donor") != (self.donor is not None):
            raise ValueError("donor needs a path (donor:PATH), and no other source takes one")
        if self.donor is not None and self.layers:
            raise ValueError("a donor gives every layer its indexer; leave out `layers`, or the donor")
        return self

    @model_validator(mode="after")
    def _budget_is_spent(self) -> Recipe:
        if self.budget is not None and not any(source in TRAINED for source in self.sources):
            raise ValueError(f"{self.indexer} does not train, a budget is for auto and distil")
        return self

    @model_validator(mode="after")
    def _sharing_can_be(self) -> Recipe:
        if self.share == "none":
            return self
        if self.layout == "deepseek_v32":
            raise ValueError("deepseek_v32 has an indexer in every layer, share needs layout auto, glm_moe_dsa or own")
        if self.share == "auto" and self.calibration is None:
            raise ValueError(
                "share: auto is decided by the loss on text; give calibration text, or the layers' numbers"
            )
        if self.share == "auto" and self.share_loss >= self.verify.max_loss_delta:
            raise ValueError(
                f"share_loss {self.share_loss:g} is no less than verify.max_loss_delta {self.verify.max_loss_delta:g}, which all that "
                "is sparse has to keep together"
            )
        return self

    @property
    def shares(self) -> bool:
        """Whether layers may have no indexer of their own."""
        return self.share != "none"

    @property
    def shared(self) -> list[int]:
        """Layers that shall have none, as far as the recipe says which."""
        return self.share if isinstance(self.share, list) else []

    @property
    def sources(self) -> list[str]:
        """Every `indexer` that is asked for, of all layers and of some."""
        return [self.indexer, *(layer.indexer for layer in self.layers.values() if layer.indexer is not None)]

    @property
    def distils(self) -> bool:
        """Whether any layer is."""
        return any(map(self.trains, self.sources))

    def trains(self, indexer: str) -> bool:
        """auto trains on text alone: on random tokens nothing would show what that does to text."""
        return indexer == "distil" or (indexer == "auto" and self.calibration is not None)

    def fields(self) -> dict[str, Any]:
        """Every field with its value, as JSON or YAML has it; of some layers only what is said of them."""
        said = {name: layer.model_dump(exclude_defaults=True) for name, layer in self.layers.items()}
        return {**self.model_dump(), "layers": said}

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
    fields = read_yaml(file) if file else {}
    fields |= {name: value for name, value in flags.items() if value is not None}
    if isinstance(fields.get("target"), str):
        fields["target"] = fields["target"].split(",")
    if isinstance(fields.get("share"), str) and fields["share"] not in ("none", "auto"):
        fields["share"] = [int(part) if _LAYER.fullmatch(part.strip()) else part for part in fields["share"].split(",")]
    source = str(fields.get("indexer", ""))
    if source.startswith("donor:"):
        fields |= {"indexer": "donor", "donor": source.removeprefix("donor:") or None}
    elif flags.get("indexer") is not None:
        fields.pop("donor", None)  # the flag overrides the file's donor, path and all
    if flags.get("indexer") is not None and flags.get("budget") is None and not _trains_any(source, fields):
        fields.pop("budget", None)  # and a budget that it has no use for
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(_explain(first, file, flags)) from None


def _trains_any(source: str, fields: Mapping[str, Any]) -> bool:
    """Whether anything is distilled, of fields that nobody has looked at yet."""
    layers = fields.get("layers")
    told = layers.values() if isinstance(layers, dict) else ()
    return source in TRAINED or any(isinstance(layer, dict) and layer.get("indexer") in TRAINED for layer in told)


def _explain(error: Any, file: str | None, flags: Mapping[str, Any]) -> str:
    """One line for pydantic's first finding: a flag is called by its flag, a field by its place in the file."""
    flag = error["loc"][:1] and flags.get(error["loc"][0]) is not None
    whole = not flag or error["loc"][0] == "layers"  # where in a flag's list is seen from what was given
    place = error["loc"] if whole else error["loc"][:1]
    where = short(".".join(map(str, place))) or "indexer"
    source = f"--{where.replace('_', '-')}" if flag or file is None else f"{file}: {where}"
    if error["loc"][:1] == ("layers",) and (reason := _not_of_some_layers(error)):
        return f"{source}: {reason}"
    if error["type"] == "extra_forbidden":
        groups: dict[str, type[BaseModel]] = {"distil": Distil, "verify": Verify}
        known = groups.get(error["loc"][0], Recipe).model_fields
        return f"{source}: no such field; known are {', '.join(known)}"
    given = f" {short(repr(error['input']))}" if error["loc"] else ""
    return f"{source}{given}: {error['msg'].removeprefix('Value error, ')}"


def _not_of_some_layers(error: Any) -> str | None:
    """Why a field under `layers` cannot be there; None where something else is wrong."""
    field, known = error["loc"][-1], ", ".join(LayerRecipe.model_fields)
    if field == "donor" or (error["loc"][2:] == ("indexer",) and str(error["input"]).startswith("donor")):
        return "a donor gives every layer its indexer; name it outside of layers, without any layers"
    if error["type"] != "extra_forbidden":
        return None
    if field in _SIZES:
        return f"config.json has one {field} for all layers, in every layout; set it outside of layers"
    if error["loc"][2:] == ("distil", field):
        return f"no such field; known are {', '.join(LayerDistil.model_fields)}"
    if field in Recipe.model_fields:
        return f"is of all layers together, set it outside of layers; what can differ is {known}"
    return f"no such field; known are {known}"
