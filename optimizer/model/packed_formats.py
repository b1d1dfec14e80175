"""Weights that lie in several tensors, told as the one that they stand for: headers only, and no torch.

    X.weight_packed I32 [O, I / 8], X.weight_scale [O, I / g], X.weight_shape     ->  X.weight INT4 [O, I]    compressed-tensors
    X.weight U8 [O, I / 2], X.weight_scale F8_E4M3 [O, I / 16], X.weight_scale_2    ->  X.weight NVFP4 [O, I]   ModelOpt

What does not fit such a form stays as it is, and is named by who reads formats (`stored_formats.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...files.safetensors_index import TensorLocation

INT4, NVFP4 = "INT4", "NVFP4"  # what takes the place of a dtype
PACKED = (INT4, NVFP4)
PARTS = {INT4: ("_packed", "_scale", "_shape"), NVFP4: ("", "_scale", "_scale_2")}  # what stands after X.weight
_MAY_BE_THERE = {
    INT4: (),
    NVFP4: (".input_scale",),
}  # after X: scales of activations, that only a runtime in four bits needs
METHODS = {INT4: "compressed-tensors", NVFP4: "modelopt"}  # quantization_config.quant_method
_FLOATS = ("F32", "F16", "BF16")
_PER_WORD, _NVFP4_GROUP = 8, 16


def whole_weights(tensors: Mapping[str, TensorLocation]) -> dict[str, TensorLocation]:
    """`tensors` with each weight that lies in several of them told as one, under the name that the model has for it."""
    found = dict(tensors)
    for name in tensors:
        weight = name.removesuffix("_packed")
        kind = _kind(tensors, name, weight)
        if kind is None:
            continue
        place = tensors[name]
        columns = place.shape[1] * (_PER_WORD if kind == INT4 else 2)
        for part in stored_parts(weight, kind):
            found.pop(part, None)
        found[weight] = place._replace(dtype=kind, shape=(place.shape[0], columns))
    return found


def stored_parts(weight: str, kind: str) -> list[str]:
    """Names of the tensors that a weight of one of PACKED lies in, with those that may be there."""
    return [weight + part for part in PARTS[kind]] + [
        weight.removesuffix(".weight") + part for part in _MAY_BE_THERE[kind]
    ]


def packed_fault(config: Mapping[str, Any], kind: str) -> str | None:
    """What quantization_config says that is not how weights of this kind are read, in one line."""
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return f"no quantization_config, so that runtimes would not unpack them; put it back (quant_method {METHODS[kind]})"
    if quantisation.get("quant_method") != METHODS[kind]:
        return f"quantization_config.quant_method is {quantisation.get('quant_method')}, expected {METHODS[kind]}"
    return _int4_fault(quantisation) if kind == INT4 else None


def _int4_fault(quantisation: Mapping[str, Any]) -> str | None:
    if quantisation.get("format", "pack-quantized") != "pack-quantized":
        return f"quantization_config.format is {quantisation['format']}, expected pack-quantized"
    groups = quantisation.get("config_groups")
    for name, group in (groups if isinstance(groups, dict) else {}).items():
        weights = (group.get("weights") if isinstance(group, dict) else None) or {}
        for field, expected in {"num_bits": 4, "type": "int", "symmetric": True, "actorder": None}.items():
            if weights.get(field, expected) != expected:
                return f"config_groups.{name}.weights.{field} is {weights[field]}, expected {expected}"
    return None


def _kind(tensors: Mapping[str, TensorLocation], name: str, weight: str) -> str | None:
    place, scale = tensors[name], tensors.get(f"{weight}_scale")
    if not weight.endswith(".weight") or len(place.shape) != 2 or scale is None or len(scale.shape) != 2:
        return None
    if scale.shape[0] != place.shape[0]:
        return None
    if name != weight:
        shape, other = tensors.get(f"{weight}_shape"), (f"{weight}_zero_point", f"{weight}_g_idx")
        columns = place.shape[1] * _PER_WORD
        fits = place.dtype == "I32" and scale.dtype in _FLOATS and scale.shape[1] and columns % scale.shape[1] == 0
        return (
            INT4
            if fits and shape is not None and shape.shape == (2,) and not any(it in tensors for it in other)
            else None
        )
    second = tensors.get(f"{weight}_scale_2")
    fits = place.dtype == "U8" and scale.dtype == "F8_E4M3" and place.shape[1] * 2 == scale.shape[1] * _NVFP4_GROUP
    return NVFP4 if fits and second is not None and second.dtype == "F32" and second.shape in ((), (1,)) else None
