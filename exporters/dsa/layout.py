"""Which layout a model is written in, and why: decided from config.json and headers, before anything is loaded.

deepseek_v32, glm_moe_dsa   a DSA class: its words in config.json, its tensors (folded where the family's rule says)
own                         the dense config and the dense tensors as they are, and the indexers beside
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UserError
from ...files.model.text_model import is_wrapper, text_config
from ...files.safetensors_index import TensorLocation
from .families import FAMILIES, GLM, LAYOUTS, NO_CLASS, OWN, QUERY_FORMS, V32, DsaClass, Family, family_of
from .folds import CannotFold, Config, Folding, Untie

_FP8_BLOCK = (128, 128)  # DeepSeek-V3's weight_block_size, when config.json does not say

# Where a quantisation method lists the modules it leaves alone.
SKIP_LISTS = {"fp8": "modules_to_not_convert", "compressed-tensors": "ignore", "modelopt": "ignore"}


@dataclass(frozen=True)
class Layout:
    """How the DSA checkpoint of one model is written.

    family: its rule; None in the own layout, as is target. forms: for a model without a query latent, how one can be made, the
    best first; one that is left is the one that is written. why: the reason for this layout, one line. untie: lm_head is
    written out. mtp: what becomes of multi-token-prediction layers.
    """

    name: str
    why: str
    family: Family | None = None
    target: DsaClass | None = None
    forms: tuple[str, ...] = ()
    untie: bool = False
    mtp: str = "keep"

    def folding(self, config: Config, tensors: Mapping[str, TensorLocation], mtp: Any = ()) -> Folding:
        """What becomes of the tensors. mtp: names of those of multi-token-prediction layers. Raises CannotFold."""
        folding = Folding(tensors, _block(config), dropped=set(mtp) if self.mtp == "drop" else set())
        if self.family is None:
            return folding
        full = with_defaults(config, self.family)
        for fold in (*(QUERY_FORMS[form] for form in self.forms[:1]), *self.family.folds):
            fold.apply(full, folding)
        if self.untie and not self.family.unties:
            Untie().apply(full, folding)
        return folding

    @property
    def in_transformers(self) -> DsaClass | None:
        """The class with an indexer that transformers reads it by."""
        others = self.family is not None and self.family.readers and "transformers" not in self.family.readers
        return None if others else self.target

    def settled(self, form: str) -> Layout:
        """With the way of making a query latent decided."""
        return replace(self, forms=(form,))


def choose(
    config: Config,
    tensors: Mapping[str, TensorLocation],
    asked: str = "auto",
    *,
    untie: bool = False,
    mtp: str = "keep",
    targets: Collection[str] = (),
    shares: bool = False,
) -> Layout:
    """The layout for a model: as asked, or the first that fits. targets: the runtimes that it is for, none: whichever read it;
    shares: layers may share indexers. Raises UserError when what was asked for does not fit."""
    if reason := can_write(config):
        raise UserError(f"no DSA checkpoint can be written: {reason}")
    if asked == OWN:
        return _own("asked for", config, untie, mtp)
    wanted = GLM.model_type if shares and asked == "auto" else asked
    fits = _not_for(config, targets) or _fitting(config, tensors, wanted, untie, mtp)
    if isinstance(fits, Layout):
        return replace(fits, why=f"layers share indexers, as its can; {fits.why}") if shares else fits
    if asked != "auto":
        raise UserError(f"--layout {asked}: {fits}; pass --layout own, or auto")
    return _own(fits, config, untie, mtp)


def can_write(config: Config) -> str | None:
    """Why no DSA checkpoint of any layout can be written for this config.json, in one line; None if one can."""
    model_type, family = config.get("model_type"), family_of(config)
    if model_type in LAYOUTS or text_config(config).get("index_topk") is not None:
        return f"model_type {model_type} with index_topk {text_config(config).get('index_topk')}: already a DSA model"
    if family is not None and (names := config.get("architectures")) and names[0] not in family.architectures:
        return f"architectures {names}: expected {family.architectures[0]}"
    if "transformers_weights" in config:
        return "transformers_weights names the weight files; rename them to the usual names and drop the field"
    return _quantisation_refusal(text_config(config).get("quantization_config"))


def with_defaults(config: Config, family: Family) -> dict[str, Any]:
    """config.json with what absent and null fields mean to the family's class."""
    full = dict(config)
    for name, value in family.defaults.items():
        if name not in full:
            full[name] = value(full) if callable(value) else value
    for name, value in family.nulls.items():
        if name in full and full[name] is None:
            full[name] = value(full) if callable(value) else value
    return full


def _not_for(config: Config, targets: Collection[str]) -> str | None:
    """Why what the family's rule writes is not for all of `targets`."""
    family = family_of(config)
    if family is None or not family.readers or (targets and set(targets) <= set(family.readers)):
        return None
    return f"{_no_family(config)}; --target {','.join(family.readers)} writes what is read there alone"


def _fitting(config: Config, tensors: Mapping[str, TensorLocation], asked: str, untie: bool, mtp: str) -> Layout | str:
    """A layout of a DSA class, or the reason why there is none."""
    family = family_of(config)
    if family is None:
        return _no_family(config)
    full = with_defaults(config, family)
    if reason := _unlike_the_classes(full):
        return reason
    made = Layout(
        asked if asked != "auto" else V32.model_type, family.why, family, LAYOUTS.get(asked, V32), untie=untie, mtp=mtp
    )
    forms, reasons = [], []
    for form in family.query_forms if full["q_lora_rank"] is None else ("",):
        try:
            replace(made, forms=(form,) if form else ()).folding(config, tensors)
            forms.append(form)
        except CannotFold as cannot:
            reasons.append(str(cannot))
    return replace(made, forms=tuple(filter(None, forms))) if forms else reasons[0]


def _no_family(config: Config) -> str:
    model_type = config.get("model_type")
    if is_wrapper(config):
        return f"{model_type} is a wrapper, whose tensors lie under another name than those of a text model"
    if reason := NO_CLASS.get(str(model_type)):
        return f"no DSA class fits {model_type}: {reason}"
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    return f"no rule for model_type {model_type} (there are rules for {known})"


def _unlike_the_classes(full: Config) -> str | None:
    kinds = full.get("mlp_layer_types") or []
    if (
        full["model_type"] == "glm4_moe_lite"
        and "dense" in kinds[next((i for i, k in enumerate(kinds) if k != "dense"), 0) :]
    ):
        return "mlp_layer_types has dense layers after sparse ones"
    return "mlp_bias is true" if full.get("mlp_bias") else None


def _own(why: str, config: Config, untie: bool, mtp: str) -> Layout:
    if untie:
        raise UserError(
            "--untie: the own layout keeps the dense model's tensors as they are; pass --layout deepseek_v32"
        )
    return Layout(OWN, why, mtp=mtp)


def _block(config: Config) -> tuple[int, int]:
    rows, columns = (config.get("quantization_config") or {}).get("weight_block_size") or _FP8_BLOCK
    return int(rows), int(columns)


def _quantisation_refusal(quantisation: Mapping[str, Any] | None) -> str | None:
    if quantisation is None or quantisation.get("quant_method") in SKIP_LISTS:
        return None
    known = ", ".join(SKIP_LISTS)
    return f"quantization_config.quant_method {quantisation.get('quant_method')} is not known here (known: {known})"
